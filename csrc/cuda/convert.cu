// W as a dense matrix, and a dense matrix sampled at W's nonzeros (the gradient of values).
#include "../bitmap.h"
#include "../tiled_csl.h"
#include "strips.cuh"
#include "tiled_csl_block.cuh"

namespace flashllm::cuda {
namespace {

constexpr int kThreads = 256;

struct Matrix {
  const uint32_t* index;
  const uint32_t* offsets;
  int64_t rows, k, capacity, index_capacity;  // of a shard; capacities in elements
  int bands, tiles, blocks;                   // of a shard; blocks a band
  int64_t shard_offsets, blocks_total;
};

struct Extent {
  int64_t base, end;  // in values, from the start of the buffer
};

__device__ inline Extent BlockExtent(const Matrix& w, int64_t shard, int64_t at, int64_t most) {
  const int64_t begin = min(int64_t(__ldg(w.offsets + at)) * 8, w.capacity);
  const int64_t end = min(int64_t(__ldg(w.offsets + at + 1)) * 8, w.capacity);
  return {shard * w.capacity + begin, shard * w.capacity + max(begin, min(end, begin + most))};
}

// Zeroes what lies behind a shard's last block of a bitmap.
__device__ inline void ClearTail(const Matrix& w, int64_t shards, uint16_t* values) {
  for (int64_t s = 0; s < shards; ++s) {
    const int64_t used =
        min(int64_t(__ldg(w.offsets + (s + 1) * w.shard_offsets - 1)) * 8, w.capacity);
    for (int64_t i = used + int64_t(blockIdx.x) * kThreads + threadIdx.x; i < w.capacity;
         i += int64_t(gridDim.x) * kThreads)
      values[s * w.capacity + i] = 0;
  }
}

// One warp a block of 16 x 256. kDecode: values to dense; else dense to values.
template <bool kDecode>
__global__ void __launch_bounds__(kThreads)
    BitmapConvert(Matrix w, int64_t shards, const uint16_t* from, uint16_t* to) {
  if (!kDecode) ClearTail(w, shards, to);
  const int lane = threadIdx.x % 32;
  const int64_t index = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (index >= w.blocks_total) return;
  const int block = static_cast<int>(index % w.blocks);
  const int64_t band = index / w.blocks;  // over all shards
  const int64_t shard = band / w.bands, row0 = band % w.bands * bitmap::kBandRows;
  const Extent extent =
      BlockExtent(w, shard, shard * w.shard_offsets + (band % w.bands) * w.blocks + block,
                  bitmap::kBlockWeights);
  int64_t at = extent.base;
  for (int i = 0; i < bitmap::kBlockTiles; ++i) {
    const int tile = block * bitmap::kBlockTiles + i;
    if (tile >= w.tiles) break;
    const uint32_t mask = w.index[(band * w.tiles + tile) * 32 + lane];
    for (int step = 0; step < bitmap::kSteps; ++step) {
      const uint32_t bits = mask >> (8 * step) & 0xff;
      int before = __popc(bits);
      const int own = before;
      for (int d = 1; d < 32; d *= 2) {
        const int up = __shfl_up_sync(~0u, before, d);
        if (lane >= d) before += up;
      }
      const int64_t total = __shfl_sync(~0u, before, 31);
      int64_t p = at + before - own;
      for (int bit = 0; bit < 8; ++bit) {
        const int64_t row = row0 + bitmap::TileRow(lane, bit);
        const int64_t col = int64_t(tile) * bitmap::kTileCols + bitmap::TileCol(lane, step, bit);
        const bool set = bits >> bit & 1, inside = row < w.rows && col < w.k;
        const int64_t element = (shard * w.rows + row) * w.k + col;
        if (kDecode) {
          if (inside) to[element] = set && p < extent.end ? from[p] : 0;
        } else if (set && p < extent.end) {
          to[p] = inside ? from[element] : 0;
        }
        p += set;
      }
      at += total;
    }
  }
  if (!kDecode)
    for (int64_t p = at + lane; p < extent.end; p += 32) to[p] = 0;
}

// One CTA a block of 64 x 128. Sampling finds `to` zeroed and leaves dead entries alone.
template <bool kDecode>
__global__ void __launch_bounds__(kThreads)
    TiledCslConvert(Matrix w, const uint16_t* from, uint16_t* to) {
  using namespace tiled_csl;
  __shared__ uint16_t dense[kBlockWeights];
  const int64_t band = blockIdx.x / w.blocks, shard = band / w.bands;
  const int64_t row0 = band % w.bands * kBlockRows, col0 = blockIdx.x % w.blocks * kBlockCols;
  const uint4 offsets = LoadOffsets(w.offsets + shard * w.shard_offsets +
                                    (band % w.bands * w.blocks + blockIdx.x % w.blocks) * 2);
  const CslBlock b = LocateBlock(w.index, offsets, w.index_capacity / 4, w.capacity / 8, shard);
  const auto element = [&](int half) {  // of the dense matrix, -1 outside of it
    const int64_t row = row0 + HalfRow(half), col = col0 + HalfCol(half);
    return row < w.rows && col < w.k ? (shard * w.rows + row) * w.k + col : -1;
  };
  if (kDecode) {
    for (int i = threadIdx.x; i < kBlockWeights; i += kThreads) dense[i] = 0;
    __syncthreads();
    ForEachWeight<kThreads>(
        b, [&](int position, int64_t at) { dense[position - kLists] = from[b.value + at]; });
    __syncthreads();
    for (int i = threadIdx.x; i < kBlockWeights; i += kThreads)
      if (const int64_t e = element(i); e >= 0) to[e] = dense[i];
  } else {
    ForEachWeight<kThreads>(b, [&](int position, int64_t at) {
      if (const int64_t e = element(position - kLists); e >= 0) to[b.value + at] = from[e];
    });
  }
}

template <bool kDecode>
cudaError_t Convert(cudaStream_t stream, const Problem& p, const uint16_t* from, uint16_t* to) {
  Matrix w = {p.index, p.offsets, p.rows, p.k, p.capacity, p.index_capacity};
  if (p.format == Format::kBitmap) {
    const bitmap::Dims d(p.rows, p.k);
    w.bands = d.bands, w.tiles = d.tiles, w.blocks = d.blocks;
    w.shard_offsets = d.offsets();
    w.blocks_total = p.shards * d.bands * d.blocks;
    const unsigned grid = CeilDiv(w.blocks_total, kThreads / 32);
    BitmapConvert<kDecode><<<grid, kThreads, 0, stream>>>(w, p.shards, from, to);
  } else {
    if (!kDecode)
      if (cudaError_t e = cudaMemsetAsync(to, 0, p.shards * p.capacity * 2, stream)) return e;
    const tiled_csl::Dims d(p.rows, p.k);
    w.bands = d.bands, w.blocks = d.blocks;
    w.shard_offsets = d.offsets();
    w.blocks_total = p.shards * d.bands * d.blocks;
    TiledCslConvert<kDecode>
        <<<static_cast<unsigned>(w.blocks_total), kThreads, 0, stream>>>(w, from, to);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t Decode(cudaStream_t stream, const Problem& p, uint16_t* dense) {
  return Convert<true>(stream, p, p.values, dense);
}

cudaError_t Sample(cudaStream_t stream, const Problem& p, const uint16_t* dense, uint16_t* values) {
  return Convert<false>(stream, p, dense, values);
}

}  // namespace flashllm::cuda
