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
// A strip's tokens are cut into groups of a.group. Strip and group together are one strip of the
// schedule, groups innermost, so that CTAs at work on one part of W are so at the same time.
#include "bitmap_stream.cuh"
#include "wgmma.cuh"

namespace flashllm::cuda {
namespace {

// As measured for groups of this many tokens.
struct Shape {
  int warps, registers;  // of a CTA that compute; theirs, beside the 32 of the warps that load
  bool steps;            // wgmma runs on from step to step, or a tile's four start and end together
  bool pairs;  // the start of every pair of weights is counted, or one address walks a step
};
constexpr Shape ShapeOf(int tokens) {
  return tokens == 32   ? Shape{16, 112, true, true}
         : tokens == 64 ? Shape{16, 112, false, false}
                        : Shape{12, 160, true, true};
}

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

// Ends a segment, as strips.cuh's Flush does.
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

// x, by one lane of a warp.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <int kTokens>
__device__ __forceinline__ void LoadX(const Args& a, uint32_t control, uint32_t ring, Work work,
                                      int lane) {
  if (lane < kXStages) {
    ptx::BarrierInit(control + kXFull + lane * 8, 1);
    ptx::BarrierInit(control + kXEmpty + lane * 8, a.warps);
  }
  ptx::FenceBarrierInit();
  __syncwarp();
  ptx::CtaBarrier();
  // Weights depend on nothing before this kernel; x does.
  ptx::WaitForPrevious();
  const int tiles = a.blocks * kBlockTiles;
  int group = work.strip % a.strip_groups, tile = work.block * kBlockTiles;
  for (int i = 0; i < work.count * kBlockTiles; ++i) {
    const int slot = i % kXStages;
    const uint32_t full = control + kXFull + slot * 8, to = ring + slot * XStageBytes<kTokens>();
    const uint8_t* from = reinterpret_cast<const uint8_t*>(a.x) +
                          (int64_t(group) * tiles + tile) * XStageBytes<kTokens>();
    ptx::BarrierWait(control + kXEmpty + slot * 8, i / kXStages & 1 ^ 1);
    if (ptx::Elect()) {
      ptx::BarrierExpect(full, XStageBytes<kTokens>());
      ptx::BulkCopy(to, from, XStageBytes<kTokens>(), full);
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
__global__ void __launch_bounds__((ShapeOf(kTokens).warps + kLoaders) * 32, 1)
    WideKernel(const __grid_constant__ Args a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr bool kSteps = ShapeOf(kTokens).steps, kPairs = ShapeOf(kTokens).pairs;
  constexpr int kN8 = kTokens / 8;
  extern __shared__ __align__(1024) uint8_t shared[];
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = ptx::Keep(threadIdx.x & 31);
  const int cta = blockIdx.x;
  // Shuffles tell the compiler what all lanes have in common.
  const int unit0 = __shfl_sync(~0u, FirstUnit(a, cta), 0);
  const int count = __shfl_sync(~0u, FirstUnit(a, cta + 1) - unit0, 0);
  const int strip0 = __shfl_sync(~0u, unit0 / a.blocks, 0), block0 = unit0 - strip0 * a.blocks;
  const uint32_t x_ring = ptx::Keep(ptx::SharedAddress(shared));
  const uint32_t control = x_ring + kXStages * XStageBytes<kTokens>();
  ptx::LaunchDependents();
  const int loader = warp - a.warps;
  if (loader >= 0) {
    ptx::LowerRegisters<32>();
    const Work work = {strip0, block0, count, a.warps, 0};
    if (loader < 2)
      LoadValues(a, control, work, loader * 8 + lane, lane >= 8 || loader * 8 + lane >= a.warps);
    else if (loader == 2)
      LoadMasks(a, control, work, lane);
    else
      LoadX<kTokens>(a, control, x_ring, work, lane);
    __syncwarp();
    return;
  }
  ptx::RaiseRegisters<ShapeOf(kTokens).registers>();

  const uint32_t values = control + kControlBytes + warp * kWarpBytes;
  const uint32_t mask_ring = values + kValueRingBytes + kRingTail;
  const uint32_t buffer = control + kControlBytes + a.warps * kWarpBytes + warp * kBufferBytes;
  int next_strip = strip0, band = BandAt(a, strip0, warp);
  Range range = LoadRange(a, band, block0, min(count, a.blocks - block0));
  Stream stream = {control + kValueFull + warp * kValueStages * 8,
                   control + kValueEmpty + warp * kValueStages * 8, 0};
  stream.ready = stream.limit = values;
  const uint32_t mask_full = control + kMaskFull + warp * kMaskStages * 8;
  const uint32_t mask_empty = control + kMaskEmpty + warp * kMaskStages * 8;
  const uint64_t x_descriptor = ptx::Descriptor(x_ring);
  const uint32_t mask_lane = ptx::Keep(mask_ring + lane * 4);
  const RunScan scan(lane);

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
    if constexpr (kPairs) {
#pragma unroll
      for (int s = 0; s < 4; ++s) pairs[0][s] = runs[s];
      scan.Pair<1>(mask, runs, pairs[1]);
      scan.Pair<2>(mask, runs, pairs[2]);
      scan.Pair<3>(mask, runs, pairs[3]);
      scan.Pair<4>(mask, runs, pairs[4]);
    }
  };
  auto load = [&](const Word& mask, auto step) {
    constexpr int kStep = decltype(step)::value;
    if constexpr (kPairs)
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
    band = BandAt(a, ++next_strip, warp);
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
  if constexpr (kSteps) {
    spread(mask);
    load(mask, Int<0>());
    load(mask, Int<1>());
  }
  auto release = [&](int tile_of_x) {
    const uint32_t empty = control + kXEmpty + tile_of_x * 8;
    if (lane == 0) ptx::BarrierArrive(empty);
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
        else if (!kSteps || i + 1 < count)
          after = ptx::LoadShared32(masks_next + (j - 2) * 128);
        if (j == 1) block_end = __ldg(offset++);
        // The next block's first tile is about to be scanned.
        auto enter_block = [&] {
          if (ends) {
            while (stream.ready != stream.limit) stream.Wait(lane);  // what offsets skip
            if (i + 1 < count) {
              tile[0] = enter(0);
              look(count - i - 1 - min(count - i - 1, a.blocks));
            } else if (kSteps) {
              tile[0] = stream.limit;
            }
          } else {
            // Blocks start on 16 bytes, or where offsets say; unless they lie.
            const uint32_t to = stream.origin + block_end * 16;
            if (to - tile[0] <= stream.limit - tile[0]) tile[0] = to;
          }
          tile[1] = tile[2] = tile[3] = tile[0];
        };

        if constexpr (!kSteps) {
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
    if constexpr (kSteps) {
      ptx::WgmmaWait(acc);
      release(kXStages - 1);
    }
    Finish(a, cta, strip, begin == 0, begin + end - first == a.blocks, warp, lane, buffer, acc);
    ++strip;
    begin = 0;
  }
#else
  __trap();  // only sm_90a has wgmma: Initialize says whether this code is
#endif
}

template <typename F>
cudaError_t ForEachKernel(F f) {
  for (auto kernel : {WideKernel<false, 32>, WideKernel<true, 32>, WideKernel<false, 64>,
                      WideKernel<true, 64>, WideKernel<false, 128>, WideKernel<true, 128>})
    if (cudaError_t e = f(kernel)) return e;
  return cudaSuccess;
}

template <int kTokens>
cudaError_t LaunchWide(cudaStream_t stream, const Args& a, bool bf16) {
  int shared;
  if (cudaError_t e = MaxShared(&shared)) return e;
  const size_t bytes = SharedBytes<kTokens>(a.warps);
  if (a.warps % 4 || a.warps > ShapeOf(kTokens).warps || bytes > size_t(shared))
    return cudaErrorInvalidValue;
  return Launch(stream, bf16 ? WideKernel<true, kTokens> : WideKernel<false, kTokens>, dim3(a.ctas),
                (a.warps + kLoaders) * 32, bytes, true, a);
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
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace flashllm::cuda
