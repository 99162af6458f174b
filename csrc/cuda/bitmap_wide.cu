// Bitmap main loop for 17 to 128 tokens: warps decode W into wgmma's operand A, x lies in shared
// memory.
//
//   warp w of a strip   band strip * warps + w (16 rows); four warps are a warpgroup of 64 rows
//
//   values, masks   HBM ==bulk copies==> rings of shared memory a warp     (bitmap_stream.cuh)
//   x               L2  ==bulk copies==> a block's four tiles a CTA         (PrepareWide)
//
//   a tile is four steps of 16 columns: eight predicated loads, four packs, a wgmma on all tokens
//
//   loads    step 2        step 3        scan, wait for values | next tile's 0, 1
//   packs        0             1             2             3                        0
//   wgmma          0 ======>     1 ======>     2 ======>     3 ======>                0 ======>
//
// A step's wgmma runs on while later ones are loaded: three more before its registers are needed.
// For 64 tokens a tile's loads, its four wgmma, and, while those run, the next tile's scan.
//
// A group of 256, whose strips belong to clusters of two CTAs, is bitmap_gemm.cu's now: that
// instance goes when the machine code of the others can be checked on a GPU again.
//
// A strip's tokens are cut into groups of a.group. Strip and group together are one strip of the
// schedule, groups innermost, so that CTAs at work on one part of W are so at the same time.
#include "bitmap_stream.cuh"
#include "wgmma.cuh"

namespace flashllm::cuda {
namespace {

class ShuffleScan;

// Warps of a CTA that compute, their registers beside the 32 of the warps that load, and CTAs that
// share a strip and its x. As measured: whether wgmma runs on from step to step (kSteps) or a
// tile's four are started and awaited together; how runs are found; and whether the start of
// every pair of weights is counted (kPairs) or one address walks a step.
template <int kTokens>
struct Shape;
template <>
struct Shape<32> {
  [[maybe_unused]] static constexpr int kWarps = 16, kRegisters = 112, kCluster = 1;
  [[maybe_unused]] static constexpr bool kSteps = true, kPairs = true;
  using Scan = RunScan;
};
template <>
struct Shape<64> {
  [[maybe_unused]] static constexpr int kWarps = 16, kRegisters = 112, kCluster = 1;
  [[maybe_unused]] static constexpr bool kSteps = false, kPairs = false;
  using Scan = RunScan;
};
template <>
struct Shape<128> {
  [[maybe_unused]] static constexpr int kWarps = 12, kRegisters = 160, kCluster = 1;
  [[maybe_unused]] static constexpr bool kSteps = true, kPairs = true;
  using Scan = RunScan;
};
template <>
struct Shape<256> {
  [[maybe_unused]] static constexpr int kWarps = 8, kRegisters = 232, kCluster = 2;
  [[maybe_unused]] static constexpr bool kSteps = true, kPairs = false;
  using Scan = ShuffleScan;
};

constexpr int kXStages = kBlockTiles;  // a block's tile j lies in stage j
static_assert(kXStages <= kMaxXStages);

template <int kTokens>
constexpr uint32_t XStageBytes() {
  return kTokens * 128;
}

template <int kTokens>
size_t SharedBytes(int warps) {
  return kXStages * XStageBytes<kTokens>() + kControlBytes + warps * (kWarpBytes + kBufferBytes);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// ---- unpack ----

// As RunScan, by one byte-packed prefix sum: for kernels whose tensor cores have enough to do.
class ShuffleScan {
 public:
  __device__ __forceinline__ explicit ShuffleScan(int) {}

  __device__ __forceinline__ void Tile(const Word& word, const Starts& tile, Starts& runs,
                                       Starts& end) const {
    const uint32_t mask = word.a[0];
    uint32_t count = mask - (mask >> 1 & 0x55555555u);
    count = (count & 0x33333333u) + (count >> 2 & 0x33333333u);
    count = (count + (count >> 4)) & 0x0f0f0f0fu;
    // Before this lane: at most 31 * 8 a byte.
    uint32_t before = ptx::AddFromLower<1>(0, count);
    before = ptx::AddFromLower<1>(before, before);
    before = ptx::AddFromLower<2>(before, before);
    before = ptx::AddFromLower<4>(before, before);
    before = ptx::AddFromLower<8>(before, before);
    before = ptx::AddFromLower<16>(before, before);
    const uint32_t b = __shfl_sync(~0u, before, 31), c = __shfl_sync(~0u, count, 31);
    const uint32_t even = (b & 0xff00ffu) + (c & 0xff00ffu);
    const uint32_t odd = (b >> 8 & 0xff00ffu) + (c >> 8 & 0xff00ffu);
    const uint32_t both = even + odd, half = both & 0xffffu;
    const int start = tile[0];
    runs[0] = start + 2 * int(before & 0xff);
    runs[2] = start + 2 * int((even & 0xffff) + (before >> 8 & 0xff));
    runs[1] = start + 2 * int(half + (before >> 16 & 0xff));
    runs[3] = start + 2 * int(half + (even >> 16) + (before >> 24));
    end[0] = end[1] = end[2] = end[3] = start + 2 * int(half + (both >> 16));
  }
};

// Two halves a register of a fragment, which hold a step's bits 0 1, 4 5, 2 3, 6 7.
__device__ constexpr int HalfOfBit(int bit) { return (bit & 1) | (bit & 2) << 1 | (bit & 4) >> 1; }

template <int kStep>
__device__ __forceinline__ void WalkHalves(uint32_t mask, uint32_t run, uint32_t* h) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    uint32_t v = 0;
    if (mask & (1u << (8 * kStep + i))) {
      v = ptx::LoadShared16(run);
      run += 2;
    }
    h[HalfOfBit(i)] = v;
  }
}

// The first of a pair starts the pair's run, the second ends it.
template <int kStep>
__device__ __forceinline__ void PairHalves(uint32_t mask, const Starts (&pairs)[5],
                                           uint32_t (&h)[8]) {
  constexpr int s = kStartOfStep[kStep], kBit = 8 * kStep;
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    uint32_t lo = 0, hi = 0;
    if (mask & (1u << (kBit + 2 * p))) lo = ptx::LoadShared16(pairs[p][s]);
    if (mask & (2u << (kBit + 2 * p))) hi = ptx::LoadShared16(pairs[p + 1][s] - 2);
    h[HalfOfBit(2 * p)] = lo, h[HalfOfBit(2 * p + 1)] = hi;
  }
}

template <int k>
struct Int {
  static constexpr int value = k;
};

// ---- epilogue ----

// Ends a segment, as strips.cuh's Flush does. `cta` counts clusters.
template <int kN8>
__device__ inline void Finish(const Args& a, int cta, int strip, bool begins, bool ends, int place,
                              int lane, uint32_t buffer, const float (&acc)[kN8][4]) {
  if (begins && ends) {
    StoreSums(a, BandOf(a, BandAt(a, strip, place)), strip % a.strip_groups * kN8 * 8, lane, buffer,
              acc);
  } else {
    float4* const to =
        reinterpret_cast<float4*>(a.partial) + PartialIndex(a, 0, cta, begins, place, 0) + lane;
#pragma unroll
    for (int n8 = 0; n8 < kN8; ++n8)
      to[n8 * 32] = make_float4(acc[n8][0], acc[n8][1], acc[n8][2], acc[n8][3]);
  }
}

#endif

// ---- main loop ----

// x, by one lane of a warp: its part of a tile to all CTAs of the cluster.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <int kTokens>
__device__ __forceinline__ void LoadX(const Args& a, uint32_t control, uint32_t ring, Work work,
                                      int rank, int lane) {
  constexpr int kCluster = Shape<kTokens>::kCluster;
  constexpr uint32_t kPart = XStageBytes<kTokens>() / kCluster;
  if (lane < kXStages) {
    ptx::BarrierInit(control + kXFull + lane * 8, 1);
    ptx::BarrierInit(control + kXEmpty + lane * 8, a.warps);
  }
  ptx::FenceBarrierInit();
  __syncwarp();
  if constexpr (kCluster > 1) ptx::ClusterArrive(), ptx::ClusterWait();
  ptx::CtaBarrier();
  // Weights depend on nothing before this kernel; x does.
  ptx::WaitForPrevious();
  const int tiles = a.blocks * kBlockTiles;
  int group = work.strip % a.strip_groups, tile = work.block * kBlockTiles;
  for (int i = 0; i < work.count * kBlockTiles; ++i) {
    const int slot = i % kXStages;
    const uint32_t full = control + kXFull + slot * 8, to = ring + slot * XStageBytes<kTokens>();
    const uint8_t* from = reinterpret_cast<const uint8_t*>(a.x) +
                          (int64_t(group) * tiles + tile) * XStageBytes<kTokens>() + rank * kPart;
    ptx::BarrierWait(control + kXEmpty + slot * 8, i / kXStages & 1 ^ 1);
    if (ptx::Elect()) {
      ptx::BarrierExpect(full, XStageBytes<kTokens>());
      if constexpr (kCluster > 1)
        ptx::BulkCopyMulticast(to + rank * kPart, from, kPart, full, (1 << kCluster) - 1);
      else
        ptx::BulkCopy(to, from, kPart, full);
    }
    __syncwarp();
    if (++tile == tiles) {
      tile = 0;
      if (++group == a.strip_groups) group = 0;
    }
  }
}
#endif

template <bool kBf16, int kTokens>
__global__ void __launch_bounds__((Shape<kTokens>::kWarps + kLoaders) * 32, 1)
    WideKernel(const __grid_constant__ Args a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Shape<kTokens>;
  constexpr int kN8 = kTokens / 8;
  extern __shared__ __align__(1024) uint8_t shared[];
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = ptx::Keep(threadIdx.x & 31);
  const int rank = S::kCluster > 1 ? ptx::ClusterRank() : 0;
  const int warps = a.warps / S::kCluster, place = rank * warps + warp;
  const int cta = static_cast<int>(blockIdx.x) / S::kCluster;
  // Shuffles tell the compiler what all lanes have in common.
  const int unit0 = __shfl_sync(~0u, FirstUnit(a, cta), 0);
  const int count = __shfl_sync(~0u, FirstUnit(a, cta + 1) - unit0, 0);
  const int strip0 = __shfl_sync(~0u, unit0 / a.blocks, 0), block0 = unit0 - strip0 * a.blocks;
  const uint32_t x_ring = ptx::Keep(ptx::SharedAddress(shared));
  const uint32_t control = x_ring + kXStages * XStageBytes<kTokens>();
  ptx::LaunchDependents();
  const int loader = warp - warps;
  if (loader >= 0) {
    ptx::LowerRegisters<32>();
    const Work work = {strip0, block0, count, warps, rank * warps};
    // x's warp waits for those of the other CTAs.
    if (S::kCluster > 1 && loader < 3) ptx::ClusterArrive();
    if (loader < 2)
      LoadValues(a, control, work, loader * 8 + lane, lane >= 8 || loader * 8 + lane >= warps);
    else if (loader == 2)
      LoadMasks(a, control, work, lane);
    else
      LoadX<kTokens>(a, control, x_ring, work, rank, lane);
    __syncwarp();
    if constexpr (S::kCluster > 1) {
      if (loader < 3) ptx::ClusterWait();
      ptx::ClusterArrive(), ptx::ClusterWait();
    }
    return;
  }
  ptx::RaiseRegisters<S::kRegisters>();
  if constexpr (S::kCluster > 1) ptx::ClusterArrive();

  const uint32_t values = control + kControlBytes + warp * kWarpBytes;
  const uint32_t mask_ring = values + kValueRingBytes + kRingTail;
  const uint32_t buffer = control + kControlBytes + warps * kWarpBytes + warp * kBufferBytes;
  int next_strip = strip0, band = BandAt(a, strip0, place);
  Range range = LoadRange(a, band, block0, min(count, a.blocks - block0));
  Stream stream = {control + kValueFull + warp * kValueStages * 8,
                   control + kValueEmpty + warp * kValueStages * 8, 0};
  stream.ready = stream.limit = values;
  const uint32_t mask_full = control + kMaskFull + warp * kMaskStages * 8;
  const uint32_t mask_empty = control + kMaskEmpty + warp * kMaskStages * 8;
  const uint64_t x_descriptor = ptx::Descriptor(x_ring);
  const uint32_t mask_lane = ptx::Keep(mask_ring + lane * 4);
  const typename S::Scan scan(lane);

  uint32_t fragments[4][4], halves[2][8];  // of steps; of those that are being loaded
  Starts runs, pairs[5], tile = {};        // of the next tile; of this one; where that starts

  // Waits for the values of the tile whose runs these are. `tile` is its end. All values of the
  // tile before it have been loaded: their room may be given back.
  auto await = [&] {
    while (__any_sync(~0u, int(tile[0] - stream.ready) > 0)) {
      if (stream.ready == stream.limit) {  // masks that lie
        tile[0] = tile[1] = tile[2] = tile[3] = stream.limit;
        break;
      }
      if (!stream.Wait(lane)) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (runs[i] >= int(values + kValueRingBytes)) runs[i] -= kValueRingBytes;
        tile[i] -= kValueRingBytes;
      }
    }
  };
  auto spread = [&](const Word& mask) {
    if constexpr (S::kPairs) {
#pragma unroll
      for (int s = 0; s < 4; ++s) pairs[0][s] = runs[s];
      scan.template Pair<1>(mask, runs, pairs[1]);
      scan.template Pair<2>(mask, runs, pairs[2]);
      scan.template Pair<3>(mask, runs, pairs[3]);
      scan.template Pair<4>(mask, runs, pairs[4]);
    }
  };
  auto load = [&](const Word& mask, auto step) {
    constexpr int kStep = decltype(step)::value;
    if constexpr (S::kPairs)
      PairHalves<kStep>(mask.a[0], pairs, halves[kStep % 2]);
    else
      WalkHalves<kStep>(mask.a[0], runs[kStartOfStep[kStep]], halves[kStep % 2]);
  };
  uint32_t tile_halves[32];
  auto walk = [&](const Word& mask) {
    WalkHalves<0>(mask.a[0], runs[kStartOfStep[0]], tile_halves);
    WalkHalves<1>(mask.a[0], runs[kStartOfStep[1]], tile_halves + 8);
    WalkHalves<2>(mask.a[0], runs[kStartOfStep[2]], tile_halves + 16);
    WalkHalves<3>(mask.a[0], runs[kStartOfStep[3]], tile_halves + 24);
#pragma unroll
    for (int f = 0; f < 16; ++f)
      fragments[f / 4][f % 4] = ptx::PackHalves(tile_halves[2 * f], tile_halves[2 * f + 1]);
  };
  auto pack = [&](int step) {
    const uint32_t (&h)[8] = halves[step % 2];
#pragma unroll
    for (int f = 0; f < 4; ++f) fragments[step][f] = ptx::PackHalves(h[2 * f], h[2 * f + 1]);
  };

  const uint32_t* offset = nullptr;  // of the current block's end
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
    return static_cast<int>(start);
  };
  auto look = [&](int left) {  // the next strip's range, a strip ahead
    band = BandAt(a, ++next_strip, place);
    range = LoadRange(a, band, 0, min(left, a.blocks));
  };
  tile[0] = tile[1] = tile[2] = tile[3] = enter(block0);
  look(count - min(count, a.blocks - block0));

  if constexpr (S::kCluster > 1) ptx::ClusterWait();
  ptx::CtaBarrier();
  int mask_slot = 0;  // of the next stage to wait for
  uint32_t mask_parity = 0;
  auto await_masks = [&] {
    ptx::BarrierWait(mask_full + mask_slot * 8, mask_parity);
    if (++mask_slot == kMaskStages) mask_slot = 0, mask_parity ^= 1;
  };
  await_masks();
  uint32_t masks_here = 0, masks_next = mask_lane;  // of this block and of the next
  Word mask(ptx::LoadShared32(masks_next));
  uint32_t next_mask = ptx::LoadShared32(masks_next + 128);
  scan.Tile(mask, tile, runs, tile);
  await();
  if constexpr (S::kSteps) {
    spread(mask);
    load(mask, Int<0>());
    load(mask, Int<1>());
  }
  auto release = [&](int tile_of_x) {
    const uint32_t empty = control + kXEmpty + tile_of_x * 8;
    if constexpr (S::kCluster > 1) {
      if (lane < S::kCluster) ptx::BarrierArriveAt(empty, lane);
    } else {
      if (lane == 0) ptx::BarrierArrive(empty);
    }
  };

  int i = 0, strip = strip0, begin = block0;
  while (i < count) {
    const int first = i, end = min(count, i + a.blocks - begin);  // of the segment
    float acc[kN8][4] = {};
    for (; i < end; ++i) {
      const bool ends = i + 1 == end;
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
        uint32_t after = 0;  // the mask two tiles on; none behind the last
        if (j < 2)
          after = ptx::LoadShared32(masks_here + (j + 2) * 128);
        else if (!S::kSteps || i + 1 < count)
          after = ptx::LoadShared32(masks_next + (j - 2) * 128);
        if (j == 1) block_end = __ldg(offset++);
        // The next block's first tile is about to be scanned.
        auto enter_block = [&] {
          if (ends) {
            while (stream.ready != stream.limit) stream.Wait(lane);  // what offsets skip
            if (i + 1 < count) {
              tile[0] = enter(0);
              look(count - i - 1 - min(count - i - 1, a.blocks));
            } else if (S::kSteps) {
              tile[0] = stream.limit;
            }
          } else {
            // Blocks start on 16 bytes, or where offsets say; unless they lie.
            const uint32_t to = stream.origin + block_end * 16;
            if (to - tile[0] <= stream.limit - tile[0]) tile[0] = to;
          }
          tile[1] = tile[2] = tile[3] = tile[0];
        };

        if constexpr (!S::kSteps) {
          walk(mask);
          if (j == kBlockTiles - 1) enter_block();
          ptx::BarrierWait(control + kXFull + j * 8, i & 1);
          const uint64_t b = x_descriptor + j * (XStageBytes<kTokens>() >> 4);
          ptx::NamedBarrier(1 + warp / 4, 128);
          ptx::WgmmaFence();
#pragma unroll
          for (int s = 0; s < 4; ++s) ptx::Wgmma<kBf16>(acc, fragments[s], b + 2 * s);
          ptx::WgmmaCommit();
          __syncwarp();
          mask = Word(next_mask);
          scan.Tile(mask, tile, runs, tile);
          next_mask = after;
          ptx::WgmmaWait(acc);
          release(j);
          if (j < kBlockTiles - 1 || i + 1 < count) await();
          continue;
        }

        // ---- this tile's steps ----
        const Word next(next_mask);
        ptx::BarrierWait(control + kXFull + j * 8, i & 1);
        const uint64_t b = x_descriptor + j * (XStageBytes<kTokens>() >> 4);
        // Together, or each warp reads x for itself.
        ptx::NamedBarrier(1 + warp / 4, 128);
        auto multiply = [&](int step) {
          pack(step);
          ptx::WgmmaFence();
          ptx::Wgmma<kBf16>(acc, fragments[step], b + 2 * step);
          ptx::WgmmaCommit();
          __syncwarp();  // or the compiler starts them last
          ptx::WgmmaWaitAllBut<3>();
        };
        multiply(0);
        load(mask, Int<2>());
        multiply(1);
        load(mask, Int<3>());
        multiply(2);
        if (j > 0 || i > first) release((j + kXStages - 1) % kXStages);
        if (j < kBlockTiles - 1) scan.Tile(next, tile, runs, tile);
        multiply(3);

        // ---- the next tile ----
        // No loop that waits may lie between two steps of a tile (C7513).
        if (j == kBlockTiles - 1) {
          enter_block();
          scan.Tile(next, tile, runs, tile);
        }
        await();
        mask = next;
        next_mask = after;
        spread(mask);
        load(mask, Int<0>());
        load(mask, Int<1>());
      }
    }
    if constexpr (S::kSteps) {
      ptx::WgmmaWait(acc);
      release(kXStages - 1);
    }
    Finish(a, cta, strip, begin == 0, begin + end - first == a.blocks, place, lane, buffer, acc);
    ++strip;
    begin = 0;
  }
  // The other CTA may still free its x here.
  __syncwarp();
  if constexpr (S::kCluster > 1) ptx::ClusterArrive(), ptx::ClusterWait();
#else
  __trap();  // only sm_90a has wgmma: Initialize says whether this code is
#endif
}

template <typename F>
cudaError_t ForEachKernel(F f) {
  for (auto kernel : {WideKernel<false, 32>, WideKernel<true, 32>, WideKernel<false, 64>,
                      WideKernel<true, 64>, WideKernel<false, 128>, WideKernel<true, 128>,
                      WideKernel<false, 256>, WideKernel<true, 256>})
    if (cudaError_t e = f(kernel)) return e;
  return cudaSuccess;
}

template <int kTokens>
cudaError_t LaunchWide(cudaStream_t stream, const Args& a, bool bf16) {
  using S = Shape<kTokens>;
  int shared;
  if (cudaError_t e = MaxShared(&shared)) return e;
  const int warps = a.warps / S::kCluster;
  const size_t bytes = SharedBytes<kTokens>(warps);
  if (a.warps % (4 * S::kCluster) || warps > S::kWarps || bytes > size_t(shared))
    return cudaErrorInvalidValue;
  return LaunchClusters(stream, S::kCluster,
                        bf16 ? WideKernel<true, kTokens> : WideKernel<false, kTokens>,
                        dim3(a.ctas * S::kCluster), (warps + kLoaders) * 32, bytes, true, a);
}

}  // namespace

cudaError_t InitializeBitmapWide() {
  int shared;
  if (cudaError_t e = MaxShared(&shared)) return e;
  return ForEachKernel([&](auto kernel) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  });
}

cudaError_t BitmapWide(cudaStream_t stream, const Args& a, bool bf16) {
  switch (a.group) {
    case 32:
      return LaunchWide<32>(stream, a, bf16);
    case 64:
      return LaunchWide<64>(stream, a, bf16);
    case 128:
      return LaunchWide<128>(stream, a, bf16);
    case 256:
      return LaunchWide<256>(stream, a, bf16);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace flashllm::cuda
