// Bitmap main loop for more than 128 tokens: warps of their own decode W to shared memory, where
// warpgroups multiply it by x, which lies there too.
//
//   values, masks   HBM ==bulk copies==> rings of shared memory a decoding warp (bitmap_stream.cuh)
//   x               L2  ==bulk copies==> stages of 64 columns, for both CTAs of a cluster
//
//   decode     | half a tile's loads | stage free? | expand, store | the other half |
//   multiply   | W and x there? | 4 x 2 wgmma started | those before are done: free their stages |
//
// A CTA has 128 rows, a band of 16 for each decoding warp. A stage of W is their tiles of the same
// 64 columns. The two CTAs of a cluster share a strip of 256 rows: each fetches half of x for both.
//
// A strip's tokens are cut into groups of a.group. Strip and group together are one strip of the
// schedule, groups innermost. A share (a cluster's units) that starts inside of a strip leaves sums
// for the share that has the strip's start, whose last strip that is: it adds them in order of K.
// Shares count against the order in which CTAs start, so whoever is waited for runs or has run.
#include <cuda.h>

#define FLASHLLM_VALUE_STAGES 3
#include "bitmap_stream.cuh"
#include "wgmma.cuh"

namespace flashllm::cuda {
namespace {

constexpr int kCluster = 2;
constexpr int kDecoders = 8, kMultipliers = 8;  // warps of a CTA
constexpr int kThreads = (kDecoders + kMultipliers + kLoaders) * 32;
constexpr uint32_t kWStageBytes = kDecoders * bitmap::kBandRows * 128;

constexpr int kTokens = 256;
[[maybe_unused]] constexpr int kN8 = kTokens / 8;
constexpr int kWStages = 3, kXStages = 3;
constexpr uint32_t kXStageBytes = kTokens * 128;
[[maybe_unused]] constexpr int kMultiplyRegisters = 168, kDecodeRegisters = 56, kLoadRegisters = 32;

// Shared memory: stages of x, of W, their barriers, and what bitmap_stream.cuh has; sums' buffers.
[[maybe_unused]] constexpr uint32_t kWFull = 0, kWEmpty = 64;
constexpr uint32_t kStageControlBytes = 128;
constexpr uint32_t kSharedBytes = kXStages * kXStageBytes + kWStages * kWStageBytes +
                                  kStageControlBytes + kControlBytes + kDecoders * kWarpBytes +
                                  kMultipliers * kBufferBytes;
constexpr int kHopperBytes = 227 << 10;
static_assert(kSharedBytes <= kHopperBytes);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A stage of a ring, and the parity of its round.
template <int kStages>
struct Slot {
  int at = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void Next() {
    if (++at == kStages) at = 0, parity ^= 1;
  }
};

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

struct Layout {
  uint32_t x, w, w_barriers, control, buffers;
  explicit __device__ __forceinline__ Layout(uint32_t shared) : x(shared) {
    w = x + kXStages * kXStageBytes;
    w_barriers = w + kWStages * kWStageBytes;
    control = w_barriers + kStageControlBytes;
    buffers = control + kControlBytes + kDecoders * kWarpBytes;
  }
};

// ---- x, by one warp: half of a stage to both CTAs ----

__device__ __forceinline__ void LoadX(const Args& a, const CUtensorMap* map, const Layout& l,
                                      Work work, int rank, int lane) {
  constexpr int kPart = kTokens / kCluster;
  if (lane < kXStages) {
    ptx::BarrierInit(l.control + kXFull + lane * 8, 1);
    ptx::BarrierInit(l.control + kXEmpty + lane * 8, kMultipliers * kCluster);
  }
  if (lane < kWStages) {
    ptx::BarrierInit(l.w_barriers + kWFull + lane * 8, kDecoders * kArrivals);
    ptx::BarrierInit(l.w_barriers + kWEmpty + lane * 8, kMultipliers * kArrivals);
  }
  ptx::FenceBarrierInit();
  __syncwarp();
  ptx::ClusterArrive(), ptx::ClusterWait();
  ptx::CtaBarrier();
  // Weights depend on nothing before this kernel; x does.
  ptx::WaitForPrevious();
  const int tiles = a.blocks * kBlockTiles;
  int group = work.strip % a.strip_groups, tile = work.block * kBlockTiles;
  Slot<kXStages> slot;
  for (int i = 0; i < work.count * kBlockTiles; ++i) {
    const uint32_t full = l.control + kXFull + slot.at * 8;
    const uint32_t to = l.x + slot.at * kXStageBytes + rank * kPart * 128;
    ptx::BarrierWait(l.control + kXEmpty + slot.at * 8, slot.parity ^ 1);
    if (ptx::Elect()) {
      ptx::BarrierExpect(full, kXStageBytes);
      ptx::TileCopyMulticast(to, map, tile * 64, group * kTokens + rank * kPart, full,
                             (1 << kCluster) - 1);
    }
    __syncwarp();
    slot.Next();
    if (++tile == tiles) {
      tile = 0;
      if (++group == a.strip_groups) group = 0;
    }
  }
}

// ---- decode ----

// Where the runs of a block's four tiles start, a tile's words by eight lanes, four each. The words
// give way to the values before them in their tile, a byte a step. `starts` is of tile j in lane
// 8 j + 7: bytes of values before steps 1, 2, 3 and behind, 16 bits each.
__device__ __forceinline__ void ScanBlock(uint32_t masks, int lane, uint32_t (&mask)[4],
                                          uint2& starts) {
  const uint4 w = ptx::LoadShared128(masks + lane * 16);
#pragma unroll
  for (int j = 0; j < 4; ++j) mask[j] = ptx::LoadShared32(masks + j * 128 + lane * 4);
  const uint32_t a = ptx::ByteCounts(w.x), b = ptx::ByteCounts(w.y), c = ptx::ByteCounts(w.z);
  const uint32_t all = a + b + c + ptx::ByteCounts(w.w);
  // Before these: at most 7 * 32 a byte.
  uint32_t before = ptx::AddFromLower<1, 8>(0, all);
  before = ptx::AddFromLower<1, 8>(before, before);
  before = ptx::AddFromLower<2, 8>(before, before);
  before = ptx::AddFromLower<4, 8>(before, before);
  const uint32_t even = (before & 0xff00ffu) + (all & 0xff00ffu);
  const uint32_t odd = (before >> 8 & 0xff00ffu) + (all >> 8 & 0xff00ffu);
  const uint32_t both = even + odd, half = both & 0xffffu;
  starts.x = 2 * ((even & 0xffffu) | half << 16);
  starts.y = 2 * ((half + (even >> 16)) | (half + (both >> 16)) << 16);
  __syncwarp();
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(masks + lane * 16), "r"(before),
               "r"(before + a), "r"(before + a + b), "r"(before + a + b + c)
               : "memory");
  __syncwarp();
}

__device__ __forceinline__ void FindRuns(uint32_t before, uint2 starts, int j, int& tile,
                                         int (&runs)[4]) {
  const uint32_t x = __shfl_sync(~0u, starts.x, 8 * j + 7),
                 y = __shfl_sync(~0u, starts.y, 8 * j + 7);
  runs[0] = tile + 2 * int(before & 0xff);
  runs[1] = tile + int(x & 0xffff) + 2 * int(before >> 8 & 0xff);
  runs[2] = tile + int(x >> 16) + 2 * int(before >> 16 & 0xff);
  runs[3] = tile + int(y & 0xffff) + 2 * int(before >> 24);
  tile += int(y >> 16);
}

// Four weights of a row, a nibble of the mask: the words that hold their values. All four need the
// third word.
template <int kNibble>
__device__ __forceinline__ void LoadWords(uint32_t counts, uint32_t run, uint32_t (&words)[3]) {
  const uint32_t at = run & ~3u;
  words[0] = ptx::LoadShared32(at);
  words[1] = ptx::LoadShared32(at + 4);
  words[2] = 0;
  if (counts & 4u << 4 * kNibble) words[2] = ptx::LoadShared32(at + 8);
}

// The weights, two a register.
template <int kNibble>
__device__ __forceinline__ uint2 Expand(uint32_t mask, uint32_t run, const uint32_t (&words)[3]) {
  const uint32_t ones = (mask >> 4 * kNibble & 15) * 0x204081u & 0x01010101u;  // a bit a byte
  const uint32_t lo = __funnelshift_r(words[0], words[1], run * 8);
  const uint32_t keep = ones * 255;
  // A zero in the fourth place, unless a fourth value is there.
  uint32_t hi = __funnelshift_r(words[1], words[2], run * 8);
  if (keep != ~0u) hi &= 0xffffu;
  // Of each weight the two bytes: behind those of the weights before it, or the zero.
  const uint32_t bytes = ((ones * 0x22222200u + 0x10101010u) & keep) | (0x76767676u & ~keep);
  return make_uint2(__byte_perm(lo, hi, bytes), __byte_perm(lo, hi, bytes >> 16));
}

__device__ __forceinline__ void Decode(const Args& a, const Layout& l, Work work, int warp,
                                       int lane) {
  const uint32_t values = l.control + kControlBytes + warp * kWarpBytes;
  const int count = work.count, place = work.place + warp;
  int next_strip = work.strip, band = BandAt(a, next_strip, place);
  Range range = LoadRange(a, band, work.block, min(count, a.blocks - work.block));
  Stream stream = {l.control + kValueFull + warp * kValueStages * 8,
                   l.control + kValueEmpty + warp * kValueStages * 8, 0};
  stream.ready = stream.limit = values;
  const uint32_t mask_full = l.control + kMaskFull + warp * kMaskStages * 8;
  const uint32_t mask_empty = l.control + kMaskEmpty + warp * kMaskStages * 8;
  const uint32_t mask_lane = ptx::Keep(values + kValueRingBytes + kRingTail + lane * 4);
  // Columns 16 t .. 16 t + 7 of row g; the next eight and row g + 8 are an XOR and a sum away.
  const int g = lane >> 2, t = lane & 3;
  const uint32_t to = ptx::Keep(l.w + warp * 2048 + g * 128 + (2 * t ^ g) * 16);

  int runs[4], tile;  // the next tile

  // Waits for the values of the tile whose runs these are. `tile` is its end.
  auto await = [&] {
    while (__any_sync(~0u, int(tile - stream.ready) > 0)) {
      if (stream.ready == stream.limit) {  // masks that lie
        tile = stream.limit;
        break;
      }
      if (!stream.Wait(lane)) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (runs[i] >= int(values + kValueRingBytes)) runs[i] -= kValueRingBytes;
      tile -= kValueRingBytes;
    }
  };
  // Where blocks end, one a lane: a fence waits for every load that is under way, so one load
  // serves 32 blocks.
  const uint32_t* offset = nullptr;
  uint32_t ends = 0;
  int ends_left = 0, ends_at = 0;
  auto next_end = [&] {
    if (ends_at % 32 == 0) {
      if (lane < ends_left) ends = __ldg(offset + ends_at + lane);
      ends_left -= 32;
    }
    return __shfl_sync(~0u, ends, ends_at++ % 32);
  };
  auto enter = [&](int block) {
    // The shuffles tell the compiler that all lanes agree.
    range = Clamp(a, range);
    const uint32_t phase = Phase(ValuesAt(a, band, range.first));
    const uint32_t start =
        stream.Enter({__shfl_sync(~0u, range.first, 0), __shfl_sync(~0u, range.end, 0)},
                     __shfl_sync(~0u, phase, 0));
    const int at = min(band, a.bands - 1);
    offset = a.offsets + int64_t(at / a.shard_bands) * a.shard_offsets +
             int64_t(at % a.shard_bands) * a.blocks + 1 + block;
    ends_left = a.blocks - block, ends_at = 0;
    return static_cast<int>(start);
  };
  auto look = [&](int left) {  // the next strip's range, a strip ahead
    band = BandAt(a, ++next_strip, place);
    range = LoadRange(a, band, 0, min(left, a.blocks));
  };
  tile = enter(work.block);
  look(count - min(count, a.blocks - work.block));

  ptx::ClusterWait();
  ptx::CtaBarrier();
  int mask_slot = 0;  // of the next stage to wait for
  uint32_t mask_parity = 0;
  auto await_masks = [&] {
    ptx::BarrierWait(mask_full + mask_slot * 8, mask_parity);
    if (++mask_slot == kMaskStages) mask_slot = 0, mask_parity ^= 1;
  };
  await_masks();
  uint32_t masks_here = 0, masks_next = mask_lane;  // of this block and of the next
  uint32_t block_masks[4];
  uint2 starts;
  ScanBlock(masks_next - lane * 4, lane, block_masks, starts);
  FindRuns(ptx::LoadShared32(masks_next), starts, 0, tile, runs);
  await();

  Slot<kWStages> slot;
  int block = work.block;
  for (int i = 0; i < count; ++i) {
    const bool strip_ends = block + 1 == a.blocks;
    uint32_t block_end = 0;
    masks_here = masks_next;
    masks_next += kBlockMaskBytes;
    if (masks_next == mask_lane + kMaskRingBytes) masks_next = mask_lane;
    if (i % kMaskStageBlocks == 0) {
      // What was read of the stage before this one is in registers.
      const int last = mask_slot + 1 == kMaskStages ? 0 : mask_slot + 1;
      __syncwarp();
      if (i && Frees(lane)) ptx::BarrierArrive(mask_empty + last * 8);
    } else if (i + 1 < count) {
      await_masks();
    }

#pragma unroll
    for (int j = 0; j < kBlockTiles; ++j) {
      const uint32_t mask = block_masks[j];
      uint32_t before = 0;
      if (j < 3) before = ptx::LoadShared32(masks_here + (j + 1) * 128);
      if (j == 1) block_end = next_end();
      uint32_t words[8][3], counts = mask - (mask >> 1 & 0x55555555u);
      counts = (counts & 0x33333333u) + (counts >> 2 & 0x33333333u);
      int run[8];
      auto take = [&](auto step) {
        constexpr int s = decltype(step)::value;
        run[2 * s] = runs[s];
        run[2 * s + 1] = runs[s] + (s ? counts >> (8 * s - 1) & 14 : counts << 1 & 14);
        LoadWords<2 * s>(counts, run[2 * s], words[2 * s]);
        LoadWords<2 * s + 1>(counts, run[2 * s + 1], words[2 * s + 1]);
      };
      const uint32_t at = to + slot.at * kWStageBytes;
      const uint32_t taken = mask;
      auto put = [&](auto half) {
        constexpr int u = decltype(half)::value;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint2 e = h ? Expand<4 * u + 1>(taken, run[4 * u + 1], words[4 * u + 1])
                            : Expand<4 * u>(taken, run[4 * u], words[4 * u]);
          const uint2 f = h ? Expand<4 * u + 3>(taken, run[4 * u + 3], words[4 * u + 3])
                            : Expand<4 * u + 2>(taken, run[4 * u + 2], words[4 * u + 2]);
          ptx::StoreShared128((at ^ u * 16) + h * 1024, e.x, e.y, f.x, f.y);
        }
      };
      take(Constant<0>()), take(Constant<1>());
      ptx::BarrierWait(l.w_barriers + kWEmpty + slot.at * 8, slot.parity ^ 1);
      put(Constant<0>());
      take(Constant<2>()), take(Constant<3>());

      // ---- the next tile ----
      if (j == kBlockTiles - 1) {
        if (strip_ends || i + 1 == count) {
          while (stream.ready != stream.limit) stream.Wait(lane);  // what offsets skip
          if (i + 1 < count) {
            tile = enter(0);
            look(count - i - 1 - min(count - i - 1, a.blocks));
          }
        } else {
          // Blocks start on 16 bytes, or where offsets say; unless they lie.
          const uint32_t at = stream.origin + block_end * 16;
          if (at - tile <= stream.limit - tile) tile = at;
        }
      }
      if (j == kBlockTiles - 1) {
        ScanBlock(masks_next - lane * 4, lane, block_masks, starts);
        before = ptx::LoadShared32(masks_next);
      }
      FindRuns(before, starts, (j + 1) % kBlockTiles, tile, runs);

      // ---- store ----
      put(Constant<1>());
      ptx::FenceProxyAsync();
      __syncwarp();
      if (Frees(lane)) ptx::BarrierArrive(l.w_barriers + kWFull + slot.at * 8);
      slot.Next();
      if (j < kBlockTiles - 1 || i + 1 < count) await();
    }
    block = strip_ends ? 0 : block + 1;
  }
}

// ---- sums of a strip that another share has the start of ----

__device__ __forceinline__ float4* PartialAt(const Args& a, int share, int place, int lane) {
  return reinterpret_cast<float4*>(a.partial) + PartialIndex(a, 0, share, 0, place, 0) + lane;
}

// ---- multiply ----

template <bool kBf16>
__device__ __forceinline__ void Multiply(const Args& a, const Layout& l, Work work, int share,
                                         int warp, int lane) {
  ptx::ClusterWait();
  ptx::CtaBarrier();
  const int place = work.place + warp;
  const uint64_t w = ptx::Descriptor(l.w + warp / 4 * 64 * 128), x = ptx::Descriptor(l.x);
  const uint32_t buffer = l.buffers + warp * kBufferBytes;
  Slot<kWStages> w_slot;
  Slot<kXStages> x_slot;
  int strip = work.strip, begin = work.block;
  for (int left = work.count; left;) {
    const int blocks = min(left, a.blocks - begin);
    float acc[kN8][4] = {};
    int w_last = 0, x_last = 0;
    auto release = [&] {
      if (Frees(lane)) ptx::BarrierArrive(l.w_barriers + kWEmpty + w_last * 8);
      if (lane < kCluster) ptx::BarrierArriveAt(l.control + kXEmpty + x_last * 8, lane);
    };
    for (int i = 0; i < blocks * kBlockTiles; ++i) {
      ptx::BarrierWait(l.control + kXFull + x_slot.at * 8, x_slot.parity);
      ptx::BarrierWait(l.w_barriers + kWFull + w_slot.at * 8, w_slot.parity);
      ptx::WgmmaFence();
#pragma unroll
      for (int s = 0; s < 4; ++s)
#pragma unroll
        for (int h = 0; h < kN8 / 16; ++h)
          ptx::Wgmma<kBf16>(reinterpret_cast<float (&)[16][4]>(acc[h * 16]),
                            w + w_slot.at * (kWStageBytes >> 4) + 2 * s,
                            x + x_slot.at * (kXStageBytes >> 4) + 2 * s + h * 1024);
      ptx::WgmmaCommit();
      ptx::WgmmaWaitAllBut<1>();
      if (i) release();
      w_last = w_slot.at, x_last = x_slot.at;
      w_slot.Next(), x_slot.Next();
    }
    ptx::WgmmaWait(acc);
    release();

    // ---- the segment's end ----
    ptx::WaitForPrevious();  // it has, or x were not here; what it wrote is seen from here on
    if (begin) {
      float4* const to = PartialAt(a, share, place, lane);
#pragma unroll
      for (int n8 = 0; n8 < kN8; ++n8)
        to[n8 * 32] = make_float4(acc[n8][0], acc[n8][1], acc[n8][2], acc[n8][3]);
      __threadfence();
      __syncwarp();
      if (lane == 0) ptx::StoreRelease(a.flags + share * a.warps + place, 1);
    } else {
      if (blocks != a.blocks) {
        const int last = CtaOf(a, (strip + 1) * a.blocks - 1);
        for (int c = share + 1; c <= last; ++c) {
          while (ptx::LoadAcquire(a.flags + c * a.warps + place) == 0) ptx::Sleep(kPollNs);
          __syncwarp();
          const float4* const from = PartialAt(a, c, place, lane);
#pragma unroll
          for (int n8 = 0; n8 < kN8; ++n8) {
            const float4 v = __ldcg(from + n8 * 32);
            acc[n8][0] += v.x, acc[n8][1] += v.y, acc[n8][2] += v.z, acc[n8][3] += v.w;
          }
        }
      }
      StoreSums(a, BandOf(a, BandAt(a, strip, place)), strip % a.strip_groups * kTokens, lane,
                buffer, acc);
    }
    left -= blocks, begin = 0, ++strip;
  }
}
#endif

template <bool kBf16>
__global__ void __launch_bounds__(kThreads, 1)
    GemmKernel(const __grid_constant__ Args a, const __grid_constant__ CUtensorMap x) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t shared[];
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = ptx::Keep(threadIdx.x & 31);
  const int rank = ptx::ClusterRank();
  const int share = a.ctas - 1 - static_cast<int>(blockIdx.x) / kCluster;
  const uint32_t base = ptx::Keep(ptx::SharedAddress(shared));
  // Each role finds these anew, or what it does not need costs it registers.
  auto layout = [&] { return Layout(base); };
  auto work = [&] {
    // Shuffles tell the compiler what all lanes have in common.
    const int unit0 = __shfl_sync(~0u, FirstUnit(a, share), 0);
    const int count = __shfl_sync(~0u, FirstUnit(a, share + 1) - unit0, 0);
    const int strip = __shfl_sync(~0u, unit0 / a.blocks, 0);
    return Work{strip, unit0 - strip * a.blocks, count, kDecoders, rank * kDecoders};
  };
  ptx::LaunchDependents();
  if (warp < kMultipliers) {
    ptx::RaiseRegisters<kMultiplyRegisters>();
    ptx::ClusterArrive();
    Multiply<kBf16>(a, layout(), work(), share, warp, lane);
    // The other CTA may still free its x here.
    __syncwarp();
    ptx::ClusterArrive(), ptx::ClusterWait();
  } else if (warp < kMultipliers + kDecoders) {
    ptx::LowerRegisters<kDecodeRegisters>();
    ptx::ClusterArrive();
    Decode(a, layout(), work(), warp - kMultipliers, lane);
    __syncwarp();
    ptx::ClusterArrive(), ptx::ClusterWait();
  } else {
    ptx::LowerRegisters<kLoadRegisters>();
    const Layout l = layout();
    Work w = work();
    const int loader = warp - kMultipliers - kDecoders;
    // x's warp waits for those of the other CTA.
    if (loader < 3) ptx::ClusterArrive();
    if (loader < 2)
      LoadValues(a, l.control, w, loader * 4 + lane, lane >= 4);
    else if (loader == 2)
      LoadMasks(a, l.control, w, lane);
    else
      LoadX(a, &x, l, w, rank, lane);
    __syncwarp();
    if (loader < 3) ptx::ClusterWait();
    ptx::ClusterArrive(), ptx::ClusterWait();
  }
#else
  __trap();  // only sm_90a has wgmma: Initialize says whether this code is
#endif
}

__global__ void ClearFlags(uint32_t* flags, int count) {
  ptx::LaunchDependents();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) flags[i] = 0;
}

// x in boxes of 64 columns and a CTA's part of the tokens, swizzled as wgmma has them.
cudaError_t MapTokens(const Args& a, CUtensorMap* map) {
  static const auto encode = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault,
                                         &found) ||
        found != cudaDriverEntryPointSuccess)
      f = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(f);
  }();
  if (!encode) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(a.x_stride),
                               static_cast<cuuint64_t>(a.tokens)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(a.x_stride) * 2};
  const cuuint32_t boxes[2] = {64, kTokens / kCluster}, steps[2] = {1, 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<uint16_t*>(a.x), sizes, strides,
                boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
             ? cudaErrorInvalidValue
             : cudaSuccess;
}

}  // namespace

cudaError_t InitializeBitmapGemm() {
  int shared;
  if (cudaError_t e = MaxShared(&shared)) return e;
  if (shared < kHopperBytes) return cudaSuccess;  // where it is never launched
  for (auto kernel : {GemmKernel<false>, GemmKernel<true>})
    if (cudaError_t e =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes))
      return e;
  return cudaSuccess;
}

cudaError_t BitmapGemm(cudaStream_t stream, const Args& a, bool bf16) {
  if (a.warps != kDecoders * kCluster || a.group != kTokens) return cudaErrorInvalidValue;
  CUtensorMap map;
  if (cudaError_t e = MapTokens(a, &map)) return e;
  const int flags = a.ctas * a.warps;
  if (cudaError_t e = Launch(stream, ClearFlags, dim3(static_cast<unsigned>(CeilDiv(flags, 256))),
                             256, 0, false, a.flags, flags))
    return e;
  return LaunchClusters(stream, kCluster, bf16 ? GemmKernel<true> : GemmKernel<false>,
                        dim3(a.ctas * kCluster), kThreads, kSharedBytes, true, a, map);
}

}  // namespace flashllm::cuda
