// Bitmap main loop: every warp streams its own band and decodes it into mma fragments.
//
//   warp w of a CTA   band strip * warps + w (16 rows), the strip's blocks of 256 columns in turn
//
//   values   HBM ==bulk copies==> a ring of shared memory that only this warp uses
//   masks    HBM --cp.async, three blocks ahead--> a ring likewise
//   x        L2  --cp.async, one chunk ahead--> a ring that all warps of the CTA fill and read
//
//   tile     | 32 predicated loads = A fragments | scan of the next tile | 4 mma a token octet |
//            | the next tile's values there? else refill the ring, wait                        |
//
// The values of a band are contiguous, so they come as a stream of stages of 2 KB that know
// nothing of blocks: a warp waits for, and refills, a stage when a tile runs into the next one.
#include "../bitmap.h"
#include "bitmap_scan.cuh"
#include "strips.cuh"

namespace flashllm::cuda {
namespace {

using bitmap::kBlockCols;
using bitmap::kBlockTiles;

constexpr int kMaxWarps = 16;
constexpr int kWalkFrom = 4;  // octets of tokens: their sums leave no registers for pairs' starts
constexpr int kStages = 4;
constexpr uint32_t kStageBytes = 2048;  // a full tile
constexpr uint32_t kRingBytes = kStages * kStageBytes;
constexpr uint32_t kRingTail = 16;  // a lane's run that crosses the end: the first bytes again
constexpr int kMaskBlocks = 4;
constexpr uint32_t kMaskBlockBytes = kBlockTiles * 128;
constexpr uint32_t kWarpBytes = kMaskBlocks * kMaskBlockBytes + kRingBytes + kRingTail;
// Masks that lie (garbage) may send a lane past the end of its ring: into its masks, no further.
static_assert(kMaskBlocks * kMaskBlockBytes >= kStageBytes);

// Of x in shared memory: chunks of kTiles tiles, rows (tokens) 16 bytes longer than that, so that
// eight lanes of a 16-byte load, two tokens, hit 32 banks.
// 64 tokens of one tile at a time leave room for six warps in 99 KB, at more waiting.
[[maybe_unused]] constexpr int ChunkTiles(int n8) { return n8 < 4 ? 4 : 2; }

template <int kN8, int kChunkTiles>
struct XRing {
  static constexpr int kTiles = kChunkTiles;
  static constexpr int kVectors = kTiles * 8;
  static constexpr uint32_t kRow = kTiles * 128 + 16;
  static constexpr uint32_t kStageBytes = kN8 * 8 * kRow;
};
// A warp that loads chunk c + a at chunk c knows of the others that they have begun chunk c - a:
// 2 a + 1 stages. The more of them, the further a warp may run ahead of others.
constexpr int kMinXStages = 3, kMaxXStages = 7;

__host__ __device__ constexpr uint32_t ControlBytes(int warps) {
  return ((kMaxXStages + warps * kStages) * 8 + 127) / 128 * 128;
}

template <int kN8, int kChunkTiles = ChunkTiles(kN8)>
constexpr size_t SharedBytes(int warps, int x_stages) {
  return ControlBytes(warps) + x_stages * XRing<kN8, kChunkTiles>::kStageBytes + warps * kWarpBytes;
}

// ---- unpack ----

template <int kBit>
__device__ __forceinline__ uint32_t Take(uint32_t mask, uint32_t address) {
  uint32_t v = 0;
  if (mask & (1u << kBit)) v = ptx::LoadShared16(address);
  return v;
}

// One register of a fragment: two neighbouring weights. The first starts the pair's run, the
// second ends it.
template <int kBit>
__device__ __forceinline__ uint32_t TakePair(uint32_t mask, uint32_t start, uint32_t end) {
  return ptx::PackHalves(Take<kBit>(mask, start), Take<kBit + 1>(mask, end - 2));
}

template <int kStep>
__device__ __forceinline__ void TakeStep(uint32_t mask, const Starts (&pairs)[5],
                                         uint32_t (&a)[4]) {
  constexpr int i = kStartOfStep[kStep], kBit = 8 * kStep;
  // Registers: row g and g + 8, columns 0-1; then columns 2-3.
  a[0] = TakePair<kBit>(mask, pairs[0][i], pairs[1][i]);
  a[2] = TakePair<kBit + 2>(mask, pairs[1][i], pairs[2][i]);
  a[1] = TakePair<kBit + 4>(mask, pairs[2][i], pairs[3][i]);
  a[3] = TakePair<kBit + 6>(mask, pairs[3][i], pairs[4][i]);
}

// The same with one address that walks the step's values: fewer registers, more to wait for.
template <int kBit>
__device__ __forceinline__ uint32_t WalkPair(uint32_t mask, uint32_t& run) {
  uint32_t lo = 0, hi = 0;
  if (mask & (1u << kBit)) {
    lo = ptx::LoadShared16(run);
    run += 2;
  }
  if (mask & (2u << kBit)) {
    hi = ptx::LoadShared16(run);
    run += 2;
  }
  return ptx::PackHalves(lo, hi);
}

template <int kStep>
__device__ __forceinline__ void WalkStep(uint32_t mask, uint32_t run, uint32_t (&a)[4]) {
  a[0] = WalkPair<8 * kStep>(mask, run);
  a[2] = WalkPair<8 * kStep + 2>(mask, run);
  a[1] = WalkPair<8 * kStep + 4>(mask, run);
  a[3] = WalkPair<8 * kStep + 6>(mask, run);
}

// ---- the stream of values ----

// A warp's values, segment after segment; a segment is a CTA's part of a strip. All lanes hold
// the same, in uniform registers.
//
// Addresses count on past the end of the ring and fall back by its size when the stage at its
// start is waited for: `Wait` then says true.
struct Stream {
  const Args& a;
  int warp, strip0, block0, count, segments;
  uint32_t base, barriers;

  // The producer: one segment ahead of the consumer at most.
  const uint8_t* src = nullptr;
  uint32_t left = 0;                      // vectors of 16 bytes of the open segment to issue
  uint32_t first = 0, vectors = 0;        // of the open segment
  uint32_t next_first = 0, next_end = 0;  // of the one after, as loaded
  int opened = -1;                        // segments
  uint32_t issued = 0;                    // stages
  // The consumer.
  int segment = 0;
  uint32_t waited = 0;            // stages
  uint32_t ready = 0, limit = 0;  // addresses: landed up to here, and the segment's end
  uint32_t origin = 0;            // of vector 0 of `values`

  __device__ int BandAt(int seg) const { return (strip0 + seg) * a.warps + warp; }

  __device__ void Look(int seg) {
    const int band = BandAt(seg);
    next_first = next_end = 0;
    if (seg >= segments || band >= a.bands) return;
    const uint32_t* p = a.offsets + int64_t(band / a.shard_bands) * a.shard_offsets +
                        int64_t(band % a.shard_bands) * a.blocks;
    next_first = __ldg(p + (seg ? 0 : block0));
    next_end = __ldg(p + min(a.blocks, block0 + count - seg * a.blocks));
  }

  __device__ void Open() {
    ++opened;
    const uint32_t capacity = static_cast<uint32_t>(min(a.capacity, int64_t(0xffffffffu)));
    // The shuffles tell the compiler that all lanes agree.
    first = __shfl_sync(~0u, min(next_first, capacity), 0);
    const uint32_t end = __shfl_sync(~0u, min(next_end, capacity), 0);
    left = vectors = end > first ? end - first : 0;
    src = reinterpret_cast<const uint8_t*>(a.values) +
          (int64_t(BandAt(opened) / a.shard_bands) * a.capacity + first) * 16;
    Look(opened + 1);
  }

  // Issues stages until kAhead are under way: the one before them is being read.
  template <int kAhead = kStages - 1>
  __device__ __forceinline__ void Fill(int lane) {
    while (issued - waited < kAhead) {
      if (left == 0) {
        if (opened > segment || opened + 1 >= segments) break;
        Open();
        continue;
      }
      const uint32_t n = min(left, kStageBytes / 16), slot = issued % kStages;
      const uint32_t barrier = barriers + slot * 8, dst = base + slot * kStageBytes;
#if __CUDA_ARCH__ >= 900
      if (ptx::Elect()) {
        ptx::BarrierExpect(barrier, n * 16 + (slot ? 0 : kRingTail));
        ptx::BulkCopy(dst, src, n * 16, barrier);
        if (slot == 0) ptx::BulkCopy(base + kRingBytes, src, kRingTail, barrier);
      }
#else
      for (uint32_t v = lane; v < n; v += 32) ptx::CopyAsync16(dst + v * 16, src + v * 16);
      if (slot == 0 && lane == 0) ptx::CopyAsync16(base + kRingBytes, src);
      ptx::CopyAsyncArrive(barrier);
#endif
      src += kStageBytes;
      left -= n;
      ++issued;
    }
  }

  // The consumer enters the open segment, at `limit`.
  __device__ void Enter() {
    origin = limit - first * 16;
    limit += (vectors * 16 + kStageBytes - 1) / kStageBytes * kStageBytes;
  }

  // Waits for the next stage. The one before the last is read no more.
  __device__ __forceinline__ bool Wait(int lane) {
    __syncwarp();
    Fill(lane);
    ptx::BarrierWait(barriers + waited % kStages * 8, waited / kStages & 1);
    const bool wraps = waited % kStages == 0 && waited != 0;
    if (wraps) ready -= kRingBytes, limit -= kRingBytes, origin -= kRingBytes;
    ready += kStageBytes;
    ++waited;
    return wraps;
  }
};

// ---- main loop ----

template <bool kBf16, int kN8, int kChunkTiles = ChunkTiles(kN8)>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) BitmapKernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(128) uint8_t shared[];
  using X = XRing<kN8, kChunkTiles>;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = ptx::Keep(threadIdx.x & 31);
  const int group = blockIdx.y, cta = blockIdx.x;
  // Shuffles tell the compiler what all lanes have in common.
  const int unit0 = __shfl_sync(~0u, FirstUnit(a, cta), 0);
  const int count = __shfl_sync(~0u, FirstUnit(a, cta + 1) - unit0, 0);
  const int strip0 = __shfl_sync(~0u, unit0 / a.blocks, 0), block0 = unit0 - strip0 * a.blocks;
  ptx::LaunchDependents();

  // ---- shared memory ----
  const uint32_t x_barriers = ptx::SharedAddress(shared);
  const uint32_t values = x_barriers + ControlBytes(a.warps) + warp * kWarpBytes;
  const uint32_t mask_ring = values + kRingBytes + kRingTail;
  const uint32_t x_ring = x_barriers + ControlBytes(a.warps) + a.warps * kWarpBytes;
  const uint32_t barriers = x_barriers + (kMaxXStages + warp * kStages) * 8;
  Stream stream = {a,      warp,    strip0, block0, count, (block0 + count - 1) / a.blocks + 1,
                   values, barriers};
  stream.ready = stream.limit = values;
  stream.Look(0);  // nothing can be asked for before these offsets are here
  if (threadIdx.x < a.x_stages) ptx::BarrierInit(x_barriers + threadIdx.x * 8, a.warps * 32);
#if __CUDA_ARCH__ >= 900
  if (lane < kStages) ptx::BarrierInit(barriers + lane * 8, 1);
#else
  if (lane < kStages) ptx::BarrierInit(barriers + lane * 8, 32);
#endif
  ptx::FenceBarrierInit();
  __syncthreads();

  // ---- load: masks, a block a group of copies ----
  int load_block = block0, load_band = stream.BandAt(0), loaded = 0;
  const uint32_t* mask_row = a.index + int64_t(load_band) * a.tiles * 32 + lane * 4;
  const uint32_t mask_to = ptx::Keep(mask_ring + lane * 16);
  auto load_masks = [&] {
    if (loaded < count) {
      const uint32_t to = mask_to + uint32_t(loaded) % kMaskBlocks * kMaskBlockBytes;
      if (load_band < a.bands && load_block * kBlockTiles + (lane >> 3) < a.tiles)
        ptx::CopyAsync16(to, mask_row + load_block * (kBlockTiles * 32));
      else
        ptx::ZeroShared128(to);
      ++loaded;
      if (++load_block == a.blocks) {
        load_block = 0;
        load_band += a.warps;
        mask_row += int64_t(a.warps) * a.tiles * 32;
      }
    }
    ptx::CopyAsyncCommit();
  };

  // ---- load: x, a warp a row ----
  const int tokens = min(a.tokens - group * kN8 * 8, kN8 * 8);
  const int x_rows = warp < tokens ? (tokens - warp + a.warps - 1) / a.warps : 0;
  const uint16_t* const x_from =
      ptx::Keep(a.x + (int64_t(group) * kN8 * 8 + warp) * a.x_stride + lane * 8);
  const uint32_t x_to = ptx::Keep(x_ring + warp * X::kRow + lane * 16);
  int load_slot = 0, load_col = block0 * kBlockCols;
  auto load_x = [&] {
    if (X::kVectors == 32 || lane < X::kVectors) {
      uint32_t to = x_to + load_slot * X::kStageBytes;
      const uint16_t* from = x_from + load_col;
      const bool inside = load_col + lane * 8 < a.x_stride;
#pragma unroll 1
      for (int row = 0; row < x_rows; ++row) {
        if (inside)
          ptx::CopyAsync16(to, from);
        else
          ptx::ZeroShared128(to);
        to += a.warps * X::kRow;
        from += a.warps * a.x_stride;
      }
    }
    ptx::CopyAsyncArrive(x_barriers + load_slot * 8);
    if (++load_slot == a.x_stages) load_slot = 0;
    load_col += X::kTiles * 64;
    if (load_col == a.blocks * kBlockCols) load_col = 0;
  };

  // What the first tile needs comes first: memory then takes microseconds for all that is asked.
  load_masks();
  stream.Open();
  stream.Enter();
  stream.Fill<1>(lane);
  // Weights depend on nothing before this kernel; x may.
  ptx::WaitForPrevious();
  load_x();
  load_masks(), load_masks();
  stream.Fill(lane);
  for (int ahead = 1; ahead < a.x_stages / 2; ++ahead) load_x();

  // The lane's 32 bytes of a token in a tile are its B fragments of the four steps. A first octet
  // that is not full reads its last token again; other octets read what lies there: a column of
  // mma that is never stored.
  const int x_token = kN8 == 1 ? min(lane >> 2, tokens - 1) : lane >> 2;
  const uint32_t x_lane = ptx::Keep(x_ring + x_token * X::kRow + (lane & 3) * 32);
  const uint32_t mask_lane = ptx::Keep(mask_ring + lane * 4);
  const RunScan scan(lane);

  float acc[1][kN8][4] = {};
  Starts runs, tile = {int(values), int(values), int(values), int(values)};  // the next tile

  // Waits for the values of the tile whose runs these are. `tile` is its end.
  auto await = [&] {
    while (__any_sync(~0u, int(tile[0] - stream.ready) > 0)) {
      if (stream.ready == stream.limit) {  // masks that lie
        tile[0] = tile[1] = tile[2] = tile[3] = stream.limit;
        break;
      }
      if (!stream.Wait(lane)) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (runs[i] >= int(values + kRingBytes)) runs[i] -= kRingBytes;
        tile[i] -= kRingBytes;
      }
    }
  };
  ptx::CopyAsyncWait<2>();
  __syncwarp();
  Word mask(ptx::LoadShared32(mask_lane));
  uint32_t next_mask = ptx::LoadShared32(mask_lane + 128);
  scan.Tile(mask, tile, runs, tile);
  await();

  const uint32_t* offset = a.offsets;  // of the current block's end
  auto seek = [&](int band) {
    band = min(band, a.bands - 1);
    offset = a.offsets + int64_t(band / a.shard_bands) * a.shard_offsets +
             int64_t(band % a.shard_bands) * a.blocks + 1;
  };
  seek(stream.BandAt(0));
  offset += block0;

  int strip = strip0, block = block0, begin = block0, ordinal = 0;
  int x_slot = 0;
  uint32_t x_parity = 0;
  for (int i = 0; i < count; ++i) {
    const bool strip_ends = block + 1 == a.blocks;
    const int next_block = strip_ends ? 0 : block + 1;
    uint32_t block_end = 0;
    load_masks();
    ptx::CopyAsyncWait<2>();  // the next block's are there
    __syncwarp();
    const uint32_t masks_here = mask_lane + uint32_t(i) % kMaskBlocks * kMaskBlockBytes;
    const uint32_t masks_next = mask_lane + uint32_t(i + 1) % kMaskBlocks * kMaskBlockBytes;
    uint32_t x_at = 0;

#pragma unroll
    for (int j = 0; j < kBlockTiles; ++j) {
      if (j % X::kTiles == 0) {
        ptx::BarrierWait(x_barriers + x_slot * 8, x_parity);
        x_at = x_lane + x_slot * X::kStageBytes;
        if (++x_slot == a.x_stages) x_slot = 0, x_parity ^= 1;
        load_x();
      }
      constexpr int kAhead = kN8 == 2 ? 2 : 1;  // octets of x in registers
      uint4 x[kAhead][2];
      auto get_x = [&](int n8, uint4(&to)[2]) {
        const uint32_t from = x_at + j % X::kTiles * 128 + n8 * 8 * X::kRow;
        to[0] = ptx::LoadShared128(from);
        to[1] = ptx::LoadShared128(from + 16);
      };
#pragma unroll
      for (int n8 = 0; n8 < kAhead; ++n8) get_x(n8, x[n8]);
      const uint32_t after =
          ptx::LoadShared32(j < 2 ? masks_here + (j + 2) * 128 : masks_next + (j - 2) * 128);

      if (j == 1) block_end = __ldg(offset++);

      // ---- unpack ----
      uint32_t fragments[4][4];
      if constexpr (kN8 >= kWalkFrom) {
        WalkStep<0>(mask.a[0], runs[kStartOfStep[0]], fragments[0]);
        WalkStep<1>(mask.a[0], runs[kStartOfStep[1]], fragments[1]);
        WalkStep<2>(mask.a[0], runs[kStartOfStep[2]], fragments[2]);
        WalkStep<3>(mask.a[0], runs[kStartOfStep[3]], fragments[3]);
      } else {
        Starts pairs[5];
#pragma unroll
        for (int s = 0; s < 4; ++s) pairs[0][s] = runs[s];
        scan.Pair<1>(mask, runs, pairs[1]);
        scan.Pair<2>(mask, runs, pairs[2]);
        scan.Pair<3>(mask, runs, pairs[3]);
        scan.Pair<4>(mask, runs, pairs[4]);
        TakeStep<0>(mask.a[0], pairs, fragments[0]);
        TakeStep<1>(mask.a[0], pairs, fragments[1]);
        TakeStep<2>(mask.a[0], pairs, fragments[2]);
        TakeStep<3>(mask.a[0], pairs, fragments[3]);
      }

      // ---- the next tile ----
      if (j == kBlockTiles - 1) {
        if (strip_ends || i + 1 == count) {
          while (stream.ready != stream.limit) stream.Wait(lane);  // what offsets skip
          tile[0] = stream.limit;
          if (i + 1 < count) {
            if (stream.opened == stream.segment) stream.Open();
            ++stream.segment;
            stream.Enter();
          }
        } else {
          // Blocks start on 16 bytes, or where offsets say; unless they lie.
          const uint32_t to = stream.origin + block_end * 16;
          if (to - tile[0] <= stream.limit - tile[0]) tile[0] = to;
        }
        tile[1] = tile[2] = tile[3] = tile[0];
      }
      mask = Word(next_mask);
      scan.Tile(mask, tile, runs, tile);

      // ---- mma ----
#pragma unroll
      for (int n8 = 0; n8 < kN8; ++n8) {
        uint4(&b)[2] = x[n8 % kAhead];
        ptx::Mma<kBf16>(acc[0][n8], fragments[0], b[0].x, b[0].y);
        ptx::Mma<kBf16>(acc[0][n8], fragments[1], b[0].z, b[0].w);
        ptx::Mma<kBf16>(acc[0][n8], fragments[2], b[1].x, b[1].y);
        ptx::Mma<kBf16>(acc[0][n8], fragments[3], b[1].z, b[1].w);
        if (n8 + kAhead < kN8) get_x(n8 + kAhead, b);
      }
      next_mask = after;
      if (j < kBlockTiles - 1 || i + 1 < count) await();
    }

    if (strip_ends || i + 1 == count) {
      Flush(a, cta, group, strip, ordinal, begin, strip_ends, warp, lane, acc);
      ++ordinal;
      begin = 0;
      if (i + 1 < count) seek(stream.BandAt(stream.segment));
    }
    block = next_block;
    strip += strip_ends;
  }
  ptx::CopyAsyncWait<0>();
}

template <bool kBf16, typename F>
cudaError_t ForEachKernel(F f) {
  for (auto kernel : {BitmapKernel<kBf16, 1>, BitmapKernel<kBf16, 2>, BitmapKernel<kBf16, 4>,
                      BitmapKernel<kBf16, 8>, BitmapKernel<kBf16, 8, 1>})
    if (cudaError_t e = f(kernel)) return e;
  return cudaSuccess;
}

}  // namespace

cudaError_t InitializeBitmap(bool* overlap) {
  int shared;
  if (cudaError_t e = MaxShared(&shared)) return e;
  cudaFuncAttributes attributes;
  if (cudaError_t e = cudaFuncGetAttributes(&attributes, BitmapKernel<false, 1>)) return e;
  *overlap = attributes.ptxVersion >= 90;
  auto raise = [&](auto kernel) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  };
  if (cudaError_t e = ForEachKernel<false>(raise)) return e;
  return ForEachKernel<true>(raise);
}

template <int kN8, int kChunkTiles = ChunkTiles(kN8)>
cudaError_t LaunchBitmap(cudaStream_t stream, Args a, bool bf16, bool overlap, int shared) {
  a.x_stages = kMaxXStages;
  while (SharedBytes<kN8, kChunkTiles>(a.warps, a.x_stages) > size_t(shared))
    if ((a.x_stages -= 2) < kMinXStages) {
      if constexpr (kChunkTiles > 1 && kN8 == 8)
        return LaunchBitmap<kN8, 1>(stream, a, bf16, overlap, shared);
      return cudaErrorInvalidValue;
    }
  return Launch(stream,
                bf16 ? BitmapKernel<true, kN8, kChunkTiles> : BitmapKernel<false, kN8, kChunkTiles>,
                dim3(a.ctas, a.groups), a.warps * 32,
                SharedBytes<kN8, kChunkTiles>(a.warps, a.x_stages), overlap, a);
}

cudaError_t BitmapSpmm(cudaStream_t stream, const Args& a, bool bf16, bool overlap) {
  int shared;
  if (cudaError_t e = MaxShared(&shared)) return e;
  if (a.warps > kMaxWarps) return cudaErrorInvalidValue;
  switch (a.group) {
    case 8:
      return LaunchBitmap<1>(stream, a, bf16, overlap, shared);
    case 16:
      return LaunchBitmap<2>(stream, a, bf16, overlap, shared);
    case 32:
      return LaunchBitmap<4>(stream, a, bf16, overlap, shared);
    case 64:
      return LaunchBitmap<8>(stream, a, bf16, overlap, shared);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace flashllm::cuda
