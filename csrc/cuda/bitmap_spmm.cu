// Bitmap main loop: every warp streams its own band and decodes it into mma fragments.
//
//   warp w of a CTA   band strip * warps + w (16 rows), the strip's blocks of 256 columns in turn
//
//   values   HBM ==bulk copies==> a ring of shared memory that only this warp uses
//   masks    HBM --one block ahead--> registers
//   x        L1: the warps of a CTA go through K side by side and want the same lines
//
//   block    | wait | tile 0  tile 1  tile 2  tile 3 | refill the ring |
//   tile     | scan run starts | 32 predicated loads = A fragments | 4 mma a token octet |
//
// Warps never meet: no CTA barrier, no producer warp. A ring holds blocks of any size
// back to back, so a dense block next to an empty one costs no slot.
#include "../bitmap.h"
#include "ring.cuh"
#include "strips.cuh"

namespace flashllm::cuda {
namespace {

using bitmap::kBlockTiles;

constexpr int kBlockBytes = bitmap::kBlockWeights * 2;  // of values, at 0% sparsity
constexpr int kMaxWarps = 16;
constexpr int kBarrierBytes = kMaxWarps * kSlots * 8;

// Offsets that lie (garbage) may send a lane past its block, never past this.
constexpr int kTailBytes = kBlockBytes;

// Two neighbouring weights of a lane, bits kBit and kBit + 1 of its mask, as one register of
// an A fragment. `run` walks the lane's values of this step.
template <int kBit>
__device__ __forceinline__ uint32_t TakePair(uint32_t mask, uint32_t& run) {
  uint32_t pair = 0;
  if (mask & (1u << kBit)) {
    pair = ptx::LoadShared16(run);
    run += 2;
  }
  if (mask & (2u << kBit)) {
    pair += ptx::LoadShared16(run) << 16;
    run += 2;
  }
  return pair;
}

// Counts the bits of each byte.
__device__ __forceinline__ uint32_t ByteCounts(uint32_t m) {
  m -= (m >> 1) & 0x55555555u;
  m = (m & 0x33333333u) + ((m >> 2) & 0x33333333u);
  return (m + (m >> 4)) & 0x0f0f0f0fu;
}

// Starts of the lane's four runs. A step's counts over the lanes below sum to at most 248, so
// the four sums never carry into each other once the lane's own are taken off.
// `run` is the tile's first byte before, the next tile's after.
__device__ __forceinline__ void RunStarts(uint32_t mask, uint32_t& run, uint32_t (&starts)[4]) {
  const uint32_t own = ByteCounts(mask);
  uint32_t below = own;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) ptx::ScanStep(below, distance);
  below -= own;
  const uint32_t last_below = __shfl_sync(~0u, below, 31), last_own = __shfl_sync(~0u, own, 31);
  // __dp4a adds chosen bytes, times two: counts to byte addresses.
  starts[0] = __dp4a(below, 0x00000002u, run);
  starts[1] = __dp4a(below, 0x00000200u, __dp4a(last_below, 0x2u, __dp4a(last_own, 0x2u, run)));
  starts[2] = __dp4a(below, 0x00020000u, __dp4a(last_below, 0x202u, __dp4a(last_own, 0x202u, run)));
  starts[3] =
      __dp4a(below, 0x02000000u, __dp4a(last_below, 0x20202u, __dp4a(last_own, 0x20202u, run)));
  run = __dp4a(last_below, 0x02020202u, __dp4a(last_own, 0x02020202u, run));
}

template <int kRow, int kHalf>
__device__ __forceinline__ void TakePairs(uint32_t mask, uint32_t (&run)[4], uint32_t (&a)[4][4]) {
  // Register of a fragment: row g or g + 8, columns 0-1 or 2-3. The four steps are
  // independent chains of loads, so they go side by side.
  constexpr int kRegister = kRow + 2 * kHalf, kBit = 4 * kRow + 2 * kHalf;
  a[0][kRegister] = TakePair<kBit>(mask, run[0]);
  a[1][kRegister] = TakePair<kBit + 8>(mask, run[1]);
  a[2][kRegister] = TakePair<kBit + 16>(mask, run[2]);
  a[3][kRegister] = TakePair<kBit + 24>(mask, run[3]);
}

template <bool kBf16, int kN8>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) BitmapKernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = blockIdx.y;
  const int cta = CtaIndex(a);
  const int64_t unit0 = FirstUnit(a, cta);
  const int count = static_cast<int>(FirstUnit(a, cta + 1) - unit0);
  ptx::LaunchDependents();
  if (count == 0) return;

  Ring ring;
  uint32_t starts = 0;  // lane s: where slot s starts
  ring.bytes = a.ring_bytes;
  ring.barriers = ptx::SharedAddress(shared) + warp * kSlots * 8;
  ring.base = ptx::SharedAddress(shared) + kBarrierBytes + warp * a.ring_bytes;
  if (lane < kSlots) {
#if __CUDA_ARCH__ >= 900
    ptx::BarrierInit(ring.barriers + lane * 8, 1);
#else
    ptx::BarrierInit(ring.barriers + lane * 8, 32);
#endif
  }
  ptx::FenceBarrierInit();
  __syncwarp();

  const int strip0 = static_cast<int>(unit0 / a.blocks);
  const int block0 = static_cast<int>(unit0 % a.blocks);

  // ---- load: values, as far ahead as the ring holds ----
  // Lane l of a batch knows where unit 32 batch + l lies: its first vector of 8, and how many.
  int64_t first = 0;
  uint32_t vectors = 0;
  int batch = -1;
  auto locate = [&](int next) {
    const int unit = block0 + next * 32 + lane;
    const int strip = strip0 + unit / a.blocks, block = unit % a.blocks;
    const int band = strip * a.warps + warp;
    vectors = 0;
    if (next * 32 + lane < count && band < a.bands) {
      const int shard = band / a.shard_bands;
      const int64_t at =
          int64_t(shard) * a.shard_offsets + int64_t(band % a.shard_bands) * a.blocks + block;
      const int64_t begin = min(int64_t(__ldg(a.offsets + at)), a.capacity);
      const int64_t end = min(int64_t(__ldg(a.offsets + at + 1)), a.capacity);
      first = shard * a.capacity + begin;
      vectors = static_cast<uint32_t>(max(int64_t(0), min(end - begin, int64_t(kBlockBytes / 16))));
    }
    batch = next;
  };
  auto refill = [&] {
    while (ring.issued < count) {
      if (ring.issued >> 5 != batch) locate(ring.issued >> 5);
      const uint32_t n = __shfl_sync(~0u, vectors, ring.issued & 31);
      uint32_t start;
      if (!ring.Claim(n * 16, &start)) break;
      const int64_t from = __shfl_sync(~0u, first, ring.issued & 31);
      const int slot = ring.issued % kSlots;
      if (lane == slot) starts = start;
      const uint32_t barrier = ring.barriers + slot * 8, dst = ring.base + start;
      const uint16_t* src = a.values + from * 8;
#if __CUDA_ARCH__ >= 900
      if (lane == 0) {
        ptx::BarrierExpect(barrier, n * 16);
        if (n) ptx::BulkCopy(dst, src, n * 16, barrier);
      }
#else
      for (uint32_t v = lane; v < n; v += 32) ptx::CopyAsync16(dst + v * 16, src + v * 8);
      ptx::CopyAsyncArrive(barrier);
#endif
      ++ring.issued;
    }
  };

  // ---- load: masks, one block ahead ----
  auto load_masks = [&](int strip, int block, uint32_t (&masks)[kBlockTiles]) {
    const int band = strip * a.warps + warp;
    const int tile = block * kBlockTiles;
    const uint32_t* p = a.index + (int64_t(band) * a.tiles + tile) * 32 + lane;
#pragma unroll
    for (int i = 0; i < kBlockTiles; ++i)
      masks[i] = band < a.bands && tile + i < a.tiles ? ptx::LoadStream4(p + i * 32) : 0;
  };

  int strip = strip0, block = block0, segment = block0, ordinal = 0;
  uint32_t next_masks[kBlockTiles];
  refill();
  load_masks(strip, block, next_masks);
  ptx::WaitForPrevious();  // weights depend on nothing before this kernel; x may

  float acc[1][kN8][4] = {};
  // The lane's 32 bytes of a token in a tile are its B fragments of the four steps.
  const int token = group * kN8 * 8 + (lane >> 2);
  const uint16_t* x_lane = a.x + token * a.x_stride + (lane & 3) * 16;

  for (int i = 0; i < count; ++i) {
    uint32_t masks[kBlockTiles];
#pragma unroll
    for (int j = 0; j < kBlockTiles; ++j) masks[j] = next_masks[j];
    const bool strip_ends = block + 1 == a.blocks;
    if (i + 1 < count) {
      load_masks(strip + strip_ends, strip_ends ? 0 : block + 1, next_masks);
    }

    const int slot = i % kSlots;
    const uint32_t start = __shfl_sync(~0u, starts, slot);
    uint32_t run = ring.base + start;
    ptx::BarrierWait(ring.barriers + slot * 8, (i / kSlots) & 1);

#pragma unroll 1
    for (int j = 0; j < kBlockTiles; ++j) {
      const int tile = block * kBlockTiles + j;
      if (tile >= a.tiles) break;
      const uint32_t mask = masks[0];
#pragma unroll
      for (int m = 0; m + 1 < kBlockTiles; ++m) masks[m] = masks[m + 1];

      constexpr int kAhead = kN8 < 4 ? kN8 : 4;  // octets of x in registers while W is decoded
      uint4 x[kAhead][2];
      auto load_x = [&](int n8, uint4(&to)[2]) {
        const uint16_t* p = x_lane + n8 * 8 * a.x_stride + tile * 64;
        to[0] = to[1] = make_uint4(0, 0, 0, 0);
        if (token + n8 * 8 < a.tokens) {
          to[0] = ptx::LoadCached16(p);
          to[1] = ptx::LoadCached16(p + 8);
        }
      };
#pragma unroll
      for (int n8 = 0; n8 < kAhead; ++n8) load_x(n8, x[n8]);

      // ---- unpack ----
      uint32_t runs[4], fragments[4][4];
      RunStarts(mask, run, runs);
      TakePairs<0, 0>(mask, runs, fragments);
      TakePairs<0, 1>(mask, runs, fragments);
      TakePairs<1, 0>(mask, runs, fragments);
      TakePairs<1, 1>(mask, runs, fragments);

      // ---- mma ----
#pragma unroll
      for (int n8 = 0; n8 < kN8; ++n8) {
        uint4(&b)[2] = x[n8 % kAhead];
        ptx::Mma<kBf16>(acc[0][n8], fragments[0], b[0].x, b[0].y);
        ptx::Mma<kBf16>(acc[0][n8], fragments[1], b[0].z, b[0].w);
        ptx::Mma<kBf16>(acc[0][n8], fragments[2], b[1].x, b[1].y);
        ptx::Mma<kBf16>(acc[0][n8], fragments[3], b[1].z, b[1].w);
        if (n8 + kAhead < kN8) load_x(n8 + kAhead, b);
      }
    }

    // ---- release ----
    __syncwarp();  // every lane has read its runs before the copy engine writes over them
    ++ring.taken;
    ring.tail = __shfl_sync(~0u, starts, ring.taken % kSlots);
    refill();

    if (strip_ends || i + 1 == count) {
      Flush(a, cta, group, strip, ordinal, segment, strip_ends, warp, lane, acc);
      ++ordinal;
      segment = 0;
    }
    block = strip_ends ? 0 : block + 1;
    strip += strip_ends;
  }
}

template <bool kBf16, typename F>
cudaError_t ForEachKernel(F f) {
  for (auto kernel : {BitmapKernel<kBf16, 1>, BitmapKernel<kBf16, 2>, BitmapKernel<kBf16, 4>,
                      BitmapKernel<kBf16, 8>})
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

cudaError_t BitmapSpmm(cudaStream_t stream, const Args& args, bool bf16, bool overlap) {
  Args a = args;
  int shared;
  if (cudaError_t e = MaxShared(&shared)) return e;
  a.ring_bytes = (shared - kBarrierBytes - kTailBytes) / a.warps / kRingAlign * kRingAlign;
  if (a.warps > kMaxWarps || a.ring_bytes < kBlockBytes) return cudaErrorInvalidValue;
  const size_t bytes = kBarrierBytes + size_t(a.ring_bytes) * a.warps + kTailBytes;
  const dim3 grid(a.ctas, a.groups);
  auto launch = [&](auto kernel) {
    return Launch(stream, kernel, grid, a.warps * 32, bytes, overlap, a);
  };
  switch (a.group * 2 + bf16) {
    case 16:
      return launch(BitmapKernel<false, 1>);
    case 17:
      return launch(BitmapKernel<true, 1>);
    case 32:
      return launch(BitmapKernel<false, 2>);
    case 33:
      return launch(BitmapKernel<true, 2>);
    case 64:
      return launch(BitmapKernel<false, 4>);
    case 65:
      return launch(BitmapKernel<true, 4>);
    case 128:
      return launch(BitmapKernel<false, 8>);
    case 129:
      return launch(BitmapKernel<true, 8>);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace flashllm::cuda
