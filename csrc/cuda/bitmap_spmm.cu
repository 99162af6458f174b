// Bitmap main loop: a warp a band, which it decodes into mma fragments, and a few warps that load.
//
//   warp w of a CTA   band strip * warps + w (16 rows), the strip's blocks of 256 columns in turn
//
//   values   HBM ==bulk copies==> a ring a warp, in stages of 2 KB     two warps, a lane a ring
//   masks    HBM ==bulk copies==> another, in stages of two blocks     a third
//   x        L2  ==bulk copies==> a ring of the CTA's                  a fourth, a lane a token
//
//   tile     | 32 predicated loads = A fragments | scan of the next tile | 4 mma a token octet |
//            | the next tile's values there? else release a stage, wait                        |
//
// The values of a band are contiguous, so they come as a stream of stages that know nothing of
// blocks. Every stage has two mbarriers: full, and, for the warps that load to look at, empty.
#include <type_traits>

#include "bitmap_stream.cuh"

namespace flashllm::cuda {
namespace {

using bitmap::kBlockCols;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr int kMaxThreads = (kMaxWarps + kLoaders) * 32;
#else
constexpr int kMaxThreads = (12 + kLoaders) * 32;  // as many as shared memory has rings for
#endif
constexpr int kWalkFrom = 4;  // octets of tokens: their sums leave no registers for pairs' starts

// Of x in shared memory: chunks of kTiles tiles, rows (tokens) 16 bytes longer than that, so that
// eight lanes of a 16-byte load, two tokens, hit 32 banks.
// 64 tokens of one tile at a time leave room for six warps in 99 KB, at more waiting.
[[maybe_unused]] constexpr int ChunkTiles(int n8) { return n8 < 4 ? 4 : 2; }

template <int kN8, int kChunkTiles>
struct XRing {
  static constexpr int kTiles = kChunkTiles;
  static constexpr uint32_t kRowBytes = kTiles * 128, kRow = kRowBytes + 16;
  static constexpr uint32_t kStageBytes = kN8 * 8 * kRow;
};
constexpr int kMinXStages = 2;

// The more is asked for at a time, the slower memory is: many warps have shorter rings.
using ShortRing = RingOf<3, kTileBytes>;
constexpr int kLongRingWarps = 12;  // at most

template <int kN8, int kChunkTiles, typename R>
constexpr size_t SharedBytes(int warps, int x_stages) {
  return kControlBytes + warps * R::kWarpBytes + x_stages * XRing<kN8, kChunkTiles>::kStageBytes;
}

// ---- the warp that loads x ----

template <typename X>
__device__ __forceinline__ void LoadX(const Args& a, uint32_t control, uint32_t ring, Work work,
                                      int token0, int tokens, int lane) {
  if (lane < a.x_stages) {
    ptx::BarrierInit(control + kXFull + lane * 8, 32);
    ptx::BarrierInit(control + kXEmpty + lane * 8, a.warps * kArrivals);
  }
  ptx::FenceBarrierInit();
  __syncwarp();
  ptx::CtaBarrier();
  // Weights depend on nothing before this kernel; x may.
  ptx::WaitForPrevious();
  const uint16_t* const x = a.x + int64_t(token0) * a.x_stride;
  const int chunks = work.count * (kBlockTiles / X::kTiles), cols = a.blocks * kBlockCols;
  int slot = 0, col = work.block * kBlockCols;
  uint32_t parity = 1;
  for (int i = 0; i < chunks; ++i) {
    const uint32_t full = control + kXFull + slot * 8;
    ptx::BarrierWait(control + kXEmpty + slot * 8, parity);
    const uint32_t to = ring + slot * X::kStageBytes;
    const uint32_t bytes = 2 * min(X::kTiles * 64, max(static_cast<int>(a.x_stride) - col, 0));
    for (int t = lane; t < tokens; t += 32) {
      if (bytes) Copy<false>(to + t * X::kRow, x + t * a.x_stride + col, bytes, full);
      Zero(a, to + t * X::kRow + bytes, X::kRowBytes - bytes);
    }
    Arrive(full);
    if (++slot == a.x_stages) slot = 0, parity ^= 1;
    if ((col += X::kTiles * 64) == cols) col = 0;
  }
}

// ---- unpack ----

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

// ---- main loop ----

template <bool kBf16, int kN8, int kChunkTiles, typename R = Ring>
__global__ void __launch_bounds__(kMaxThreads, 1) BitmapKernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(128) uint8_t shared[];
  using X = XRing<kN8, kChunkTiles>;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = ptx::Keep(threadIdx.x & 31);
  const int group = blockIdx.y, cta = blockIdx.x;
  // Shuffles tell the compiler what all lanes have in common.
  const int unit0 = __shfl_sync(~0u, FirstUnit(a, cta), 0);
  const int count = __shfl_sync(~0u, FirstUnit(a, cta + 1) - unit0, 0);
  const int strip0 = __shfl_sync(~0u, unit0 / a.blocks, 0), block0 = unit0 - strip0 * a.blocks;
  const uint32_t control = ptx::SharedAddress(shared);
  const uint32_t x_ring = control + kControlBytes + a.warps * R::kWarpBytes;
  const int tokens = min(a.tokens - group * kN8 * 8, kN8 * 8);
  ptx::LaunchDependents();
  const int loader = warp - RoundUp(a.warps, 4);
  if (loader >= 0) {
    ptx::LowerRegisters<32>();
    const Work work = {strip0, block0, count, a.warps, 0};
    // The more rings a warp has to look after, the later it comes back to each.
    const int each = (a.warps + 1) / 2, ring = loader * each + lane;
    if (loader < 2)
      LoadValues<R>(a, control, work, ring, lane >= each || ring >= a.warps);
    else if (loader == 2)
      LoadMasks<R>(a, control, work, lane);
    else
      LoadX<X>(a, control, x_ring, work, group * kN8 * 8, tokens, lane);
    return;
  }
  ptx::RaiseRegisters<112>();
  if (warp >= a.warps) {
    ptx::CtaBarrier();  // with all others
    return;
  }

  const uint32_t values = control + kControlBytes + warp * R::kWarpBytes;
  const uint32_t mask_ring = values + R::kBytes + kRingTail;
  int band = strip0 * a.warps + warp;
  Range range = LoadRange(a, band, block0, min(count, a.blocks - block0));
  StreamOf<R> stream = {control + kValueFull + warp * R::kStages * 8,
                        control + kValueEmpty + warp * R::kStages * 8, 0};
  stream.ready = stream.limit = values;
  const uint32_t mask_full = control + kMaskFull + warp * kMaskStages * 8;
  const uint32_t mask_empty = control + kMaskEmpty + warp * kMaskStages * 8;

  // The lane's 32 bytes of a token in a tile are its B fragments of the four steps. A first octet
  // that is not full reads its last token again; other octets read what lies there: a column of
  // mma that is never stored.
  const int x_token = kN8 == 1 ? min(lane >> 2, tokens - 1) : lane >> 2;
  const uint32_t x_lane = ptx::Keep(x_ring + x_token * X::kRow + (lane & 3) * 32);
  const uint32_t mask_lane = ptx::Keep(mask_ring + lane * 4);
  const RunScan scan(lane);

  float acc[kN8][4] = {};
  Starts runs, tile = {};  // the next tile

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
        if (runs[i] >= int(values + R::kBytes)) runs[i] -= R::kBytes;
        tile[i] -= R::kBytes;
      }
    }
  };

  const uint32_t* offset = nullptr;  // of the current block's end
  auto enter = [&](int block) {
    // The shuffles tell the compiler that all lanes agree.
    range = Clamp(a, range);
    const uint32_t phase = Phase<R>(ValuesAt(a, band, range.first));
    const uint32_t start =
        stream.Enter({__shfl_sync(~0u, range.first, 0), __shfl_sync(~0u, range.end, 0)},
                     __shfl_sync(~0u, phase, 0));
    const int at = min(band, a.bands - 1);
    offset = a.offsets + int64_t(at / a.shard_bands) * a.shard_offsets +
             int64_t(at % a.shard_bands) * a.blocks + 1 + block;
    return static_cast<int>(start);
  };
  auto look = [&](int left) {  // the next strip's range, a strip ahead
    band += a.warps;
    range = LoadRange(a, band, 0, min(left, a.blocks));
  };
  tile[0] = tile[1] = tile[2] = tile[3] = enter(block0);
  look(count - min(count, a.blocks - block0));

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

  int strip = strip0, block = block0, begin = block0, ordinal = 0;
  int x_slot = 0;
  uint32_t x_parity = 0, x_at = 0;
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
      if (j % X::kTiles == 0) {
        ptx::BarrierWait(control + kXFull + x_slot * 8, x_parity);
        x_at = x_lane + x_slot * X::kStageBytes;
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
          if (i + 1 < count) {
            tile[0] = enter(0);
            look(count - i - 1 - min(count - i - 1, a.blocks));
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
        ptx::Mma<kBf16>(acc[n8], fragments[0], b[0].x, b[0].y);
        ptx::Mma<kBf16>(acc[n8], fragments[1], b[0].z, b[0].w);
        ptx::Mma<kBf16>(acc[n8], fragments[2], b[1].x, b[1].y);
        ptx::Mma<kBf16>(acc[n8], fragments[3], b[1].z, b[1].w);
        if (n8 + kAhead < kN8) get_x(n8 + kAhead, b);
      }
      next_mask = after;
      if (j % X::kTiles == X::kTiles - 1) {
        __syncwarp();
        if (Frees(lane)) ptx::BarrierArrive(control + kXEmpty + x_slot * 8);
        if (++x_slot == a.x_stages) x_slot = 0, x_parity ^= 1;
      }
      if (j < kBlockTiles - 1 || i + 1 < count) await();
    }

    if (strip_ends || i + 1 == count) {
      ptx::WaitForPrevious();  // it has, or x were not here; what it wrote is seen from here on
      Flush(a, cta, group, strip, ordinal, begin, strip_ends, warp, lane, acc);
      ++ordinal;
      begin = 0;
    }
    block = strip_ends ? 0 : block + 1;
    strip += strip_ends;
  }
}

template <bool kBf16, typename F>
cudaError_t ForEachKernel(F f) {
  for (auto kernel :
       {BitmapKernel<kBf16, 1, 4>, BitmapKernel<kBf16, 1, 4, ShortRing>, BitmapKernel<kBf16, 2, 4>,
        BitmapKernel<kBf16, 2, 4, ShortRing>, BitmapKernel<kBf16, 4, 2>,
        BitmapKernel<kBf16, 4, 2, ShortRing>, BitmapKernel<kBf16, 8, 2>, BitmapKernel<kBf16, 8, 1>})
    if (cudaError_t e = f(kernel)) return e;
  return cudaSuccess;
}

}  // namespace

cudaError_t InitializeBitmap(bool* overlap) {
  int shared;
  if (cudaError_t e = MaxShared(&shared)) return e;
  cudaFuncAttributes attributes;
  if (cudaError_t e = cudaFuncGetAttributes(&attributes, BitmapKernel<false, 1, 4>)) return e;
  *overlap = attributes.ptxVersion >= 90;
  auto raise = [&](auto kernel) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  };
  if (cudaError_t e = ForEachKernel<false>(raise)) return e;
  return ForEachKernel<true>(raise);
}

template <int kN8, int kChunkTiles = ChunkTiles(kN8), typename R = Ring>
cudaError_t LaunchBitmap(cudaStream_t stream, Args a, bool bf16, bool overlap, int shared) {
  if constexpr (kN8 < 8 && std::is_same_v<R, Ring>)
    if (a.warps > kLongRingWarps)
      return LaunchBitmap<kN8, kChunkTiles, ShortRing>(stream, a, bf16, overlap, shared);
  a.x_stages = kMaxXStages;
  while (SharedBytes<kN8, kChunkTiles, R>(a.warps, a.x_stages) > size_t(shared))
    if (--a.x_stages < kMinXStages) {
      if constexpr (kChunkTiles > 1 && kN8 == 8)
        return LaunchBitmap<kN8, 1>(stream, a, bf16, overlap, shared);
      return cudaErrorInvalidValue;
    }
  return Launch(
      stream,
      bf16 ? BitmapKernel<true, kN8, kChunkTiles, R> : BitmapKernel<false, kN8, kChunkTiles, R>,
      dim3(a.ctas, a.groups), (RoundUp(a.warps, 4) + kLoaders) * 32,
      SharedBytes<kN8, kChunkTiles, R>(a.warps, a.x_stages), overlap, a);
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
