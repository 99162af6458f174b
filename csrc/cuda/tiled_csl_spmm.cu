// Tiled-CSL main loop: scatter a 128 x 64 tile into shared memory, read it back as fragments.
//
//   tile i      | scatter i + 1 into the other buffer | ldmatrix + mma on i | sync | clear | sync |
//
// Eight warps, 16 rows each. Positions are already swizzled, so ldmatrix has no bank
// conflicts; nonzeros go round the banks, so neither have the stores of a warp.
#include "../tiled_csl.h"
#include "strips.cuh"

namespace flashllm::cuda {
namespace {

using tiled_csl::kPadding;
using tiled_csl::kPositionMask;
using tiled_csl::kTileCols;
using tiled_csl::kTileWeights;

constexpr int kThreads = 256;
static_assert(tiled_csl::kTileRows == kThreads / 32 * 16, "a warp takes 16 rows");

struct Vectors {
  int64_t first;
  int count;
};

// Where a tile's nonzeros lie, in vectors of 8; offsets that lie (garbage) are cut short.
__device__ inline Vectors Locate(const Args& a, int strip, int tile) {
  const int strips_a_shard = a.shard_bands / 8;
  const int shard = strip / strips_a_shard;
  const int64_t at =
      int64_t(shard) * a.shard_offsets + int64_t(strip % strips_a_shard) * a.blocks + tile;
  const int64_t begin = min(int64_t(__ldg(a.offsets + at)), a.capacity);
  const int64_t end = min(int64_t(__ldg(a.offsets + at + 1)), a.capacity);
  return {shard * a.capacity + begin,
          static_cast<int>(max(int64_t(0), min(end - begin, int64_t(kTileWeights / 8))))};
}

struct Nonzeros {
  uint4 positions, values;  // 8 of each
};

__device__ inline Nonzeros LoadVector(const Args& a, int64_t v) {
  return {ptx::LoadStream16(a.positions + v * 8), ptx::LoadStream16(a.values + v * 8)};
}

__device__ inline void Scatter(const Nonzeros& n, uint16_t* tile) {
  const uint32_t p[4] = {n.positions.x, n.positions.y, n.positions.z, n.positions.w};
  const uint32_t v[4] = {n.values.x, n.values.y, n.values.z, n.values.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (!(p[i] & kPadding)) tile[p[i] & kPositionMask] = static_cast<uint16_t>(v[i]);
    if (!(p[i] >> 16 & kPadding))
      tile[p[i] >> 16 & kPositionMask] = static_cast<uint16_t>(v[i] >> 16);
  }
}

__device__ inline void Clear(uint16_t* tile) {
  for (int i = threadIdx.x; i < kTileWeights / 8; i += kThreads)
    reinterpret_cast<uint4*>(tile)[i] = make_uint4(0, 0, 0, 0);
}

template <bool kBf16, int kN8>
__global__ void __launch_bounds__(kThreads) TiledCslKernel(const __grid_constant__ Args a) {
  __shared__ __align__(128) uint16_t tiles[2][kTileWeights];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = blockIdx.y;
  const int64_t unit0 = FirstUnit(a, blockIdx.x);
  const int count = static_cast<int>(FirstUnit(a, blockIdx.x + 1) - unit0);
  ptx::LaunchDependents();
  if (count == 0) return;

  int strip = static_cast<int>(unit0 / a.blocks), tile = static_cast<int>(unit0 % a.blocks);
  int segment = tile, ordinal = 0;
  Clear(tiles[0]);
  Clear(tiles[1]);

  Vectors where = Locate(a, strip, tile);
  Nonzeros ahead = {};  // this thread's first vector of the tile to scatter next
  auto prefetch = [&] {
    if (static_cast<int>(threadIdx.x) < where.count)
      ahead = LoadVector(a, where.first + threadIdx.x);
  };
  auto scatter = [&](uint16_t* to) {
    if (static_cast<int>(threadIdx.x) < where.count) Scatter(ahead, to);
    for (int v = threadIdx.x + kThreads; v < where.count; v += kThreads)
      Scatter(LoadVector(a, where.first + v), to);
  };
  prefetch();
  __syncthreads();
  scatter(tiles[0]);
  auto advance = [&](int& s, int& t) {
    if (++t == a.blocks) {
      t = 0;
      ++s;
    }
  };
  int next_strip = strip, next_tile = tile;
  advance(next_strip, next_tile);
  if (count > 1) {
    where = Locate(a, next_strip, next_tile);
    prefetch();
  }
  ptx::WaitForPrevious();  // weights depend on nothing before this kernel; x may
  __syncthreads();

  float acc[kN8][4] = {};
  const int token = group * kN8 * 8 + (lane >> 2);
  const uint16_t* x_lane = a.x + token * a.x_stride + (lane & 3) * 2;
  // ldmatrix: lanes 0-7 and 8-15 address rows g and g + 8 of columns 0-7, lanes 16-31 of 8-15.
  const int row = warp * 16 + (lane & 15);

  for (int i = 0; i < count; ++i) {
    uint16_t* now = tiles[i & 1];
    if (i + 1 < count) {
      scatter(tiles[(i + 1) & 1]);
      if (i + 2 < count) {
        advance(next_strip, next_tile);
        where = Locate(a, next_strip, next_tile);
        prefetch();
      }
    }
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t fragment[4];
      const int col = (step * 16 + (lane >> 4) * 8) ^ ((row & 7) << 3);
      ptx::Ldmatrix4(fragment, ptx::SharedAddress(now + row * kTileCols + col));
#pragma unroll
      for (int n8 = 0; n8 < kN8; ++n8) {
        uint32_t b0 = 0, b1 = 0;
        if (token + n8 * 8 < a.tokens) {
          const uint16_t* p = x_lane + n8 * 8 * a.x_stride + int64_t(tile) * kTileCols + step * 16;
          b0 = ptx::LoadCached4(p);
          b1 = ptx::LoadCached4(p + 8);
        }
        ptx::Mma<kBf16>(acc[n8], fragment, b0, b1);
      }
    }
    __syncthreads();  // all have read `now`, and the other buffer is complete
    Clear(now);
    __syncthreads();  // before the next scatter writes here

    const bool strip_ends = tile + 1 == a.blocks;
    if (strip_ends || i + 1 == count) {
      Flush<kN8>(a, group, strip, ordinal, segment == 0 && strip_ends, warp, lane, acc);
      ++ordinal;
      segment = 0;
    }
    advance(strip, tile);
  }
}

}  // namespace

cudaError_t TiledCslSpmm(cudaStream_t stream, const Args& a, bool bf16) {
  if (a.warps * 32 != kThreads) return cudaErrorInvalidValue;
  const dim3 grid(a.ctas, a.groups);
  auto launch = [&](auto kernel) {
    kernel<<<grid, kThreads, 0, stream>>>(a);
    return cudaGetLastError();
  };
  switch (a.group * 2 + bf16) {
    case 16:
      return launch(TiledCslKernel<false, 1>);
    case 17:
      return launch(TiledCslKernel<true, 1>);
    case 32:
      return launch(TiledCslKernel<false, 2>);
    case 33:
      return launch(TiledCslKernel<true, 2>);
    case 64:
      return launch(TiledCslKernel<false, 4>);
    case 65:
      return launch(TiledCslKernel<true, 4>);
    case 128:
      return launch(TiledCslKernel<false, 8>);
    case 129:
      return launch(TiledCslKernel<true, 8>);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace flashllm::cuda
