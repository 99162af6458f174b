// W as a dense matrix, and a dense matrix sampled at W's nonzeros: the gradient of values, and the
// second half of encoding a bitmap.
#include "../bitmap.h"
#include "../tiled_csl.h"
#include "dense.cuh"
#include "ptx.cuh"
#include "tiled_csl_block.cuh"

namespace flashllm::cuda {
namespace {

constexpr int kThreads = 256;

struct Matrix {
  const uint32_t* index;
  const uint32_t* offsets;
  int64_t capacity, index_capacity;  // of a shard, in elements
  int bands, tiles, blocks;          // of a shard; blocks a band
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

// Where a lane's four runs of a tile start, counted from the tile's first value.
struct Runs {
  int start[bitmap::kSteps], total;
};

__device__ inline Runs FindRuns(uint32_t mask, int lane) {
  const uint32_t own = ptx::ByteCounts(mask);
  uint32_t before = __shfl_up_sync(~0u, own, 1);  // at most 31 * 8 a byte
  if (lane == 0) before = 0;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const uint32_t up = __shfl_up_sync(~0u, before, d);
    if (lane >= d) before += up;
  }
  const uint32_t last = __shfl_sync(~0u, before, 31), of_last = __shfl_sync(~0u, own, 31);
  Runs r = {};
#pragma unroll
  for (int i = 0; i < bitmap::kSteps; ++i) {
    r.start[i] = r.total + (before >> (8 * i) & 0xff);
    r.total += (last >> (8 * i) & 0xff) + (of_last >> (8 * i) & 0xff);
  }
  return r;
}

// One warp a block of 16 x 256. kDecode: values to dense; else dense to values. A lane's weights
// of a tile are 16 neighbours each of two rows; kAligned: loaded and stored eight at a time.
template <bool kDecode, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    BitmapConvert(Matrix w, int64_t shards, Dense dense, uint16_t* values) {
  if (!kDecode) ClearTail(w, shards, values);
  const int lane = threadIdx.x % 32;
  const int64_t index = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (index >= w.blocks_total) return;
  const int block = static_cast<int>(index % w.blocks);
  const int64_t band = index / w.blocks;  // over all shards
  const int64_t shard = band / w.bands;
  const Patch patch = PatchAt(dense, shard, band % w.bands * bitmap::kBandRows,
                              int64_t(block) * bitmap::kBlockCols);
  const Extent extent =
      BlockExtent(w, shard, shard * w.shard_offsets + (band % w.bands) * w.blocks + block,
                  bitmap::kBlockWeights);
  int64_t at = extent.base;
#pragma unroll 1
  for (int i = 0; i < bitmap::kBlockTiles; ++i) {
    const int tile = block * bitmap::kBlockTiles + i;
    if (tile >= w.tiles) break;
    const uint32_t mask = w.index[(band * w.tiles + tile) * 32 + lane];
    const int col = i * bitmap::kTileCols + bitmap::TileCol(lane, 0, 0);
    uint32_t rows[2][8] = {};
    if (!kDecode) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
        LoadRow<Vector<kAligned, uint4>>(patch, bitmap::TileRow(lane, 4 * h), col, rows[h]);
    }
    const Runs runs = FindRuns(mask, lane);
#pragma unroll
    for (int step = 0; step < bitmap::kSteps; ++step) {
      int64_t p = at + runs.start[step];
#pragma unroll
      for (int bit = 0; bit < 8; ++bit) {
        const bool set = mask >> (8 * step + bit) & 1, stored = set && p < extent.end;
        uint32_t& pair = rows[bit / 4][2 * step + bit % 4 / 2];
        if (stored && kDecode) pair |= uint32_t(__ldg(values + p)) << (16 * (bit % 2));
        if (stored && !kDecode) values[p] = static_cast<uint16_t>(pair >> (16 * (bit % 2)));
        p += set;
      }
    }
    if (kDecode) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
        StoreRow<Vector<kAligned, uint4>>(patch, bitmap::TileRow(lane, 4 * h), col, rows[h]);
    }
    at += runs.total;
  }
  if (!kDecode)
    for (int64_t p = at + lane; p < extent.end; p += 32) values[p] = 0;
}

// One CTA a block of 64 x 128. Sampling finds `values` zeroed and leaves dead entries alone.
template <bool kDecode>
__global__ void __launch_bounds__(kThreads)
    TiledCslConvert(Matrix w, Dense dense, uint16_t* values) {
  using namespace tiled_csl;
  __shared__ uint16_t scratch[kBlockWeights];
  const int64_t band = blockIdx.x / w.blocks, shard = band / w.bands;
  const Patch patch = PatchAt(dense, shard, band % w.bands * kBlockRows,
                              int64_t(blockIdx.x % w.blocks) * kBlockCols);
  const uint4 offsets = LoadOffsets(w.offsets + shard * w.shard_offsets +
                                    (band % w.bands * w.blocks + blockIdx.x % w.blocks) * 2);
  const CslBlock b = LocateBlock(w.index, offsets, w.index_capacity / 4, w.capacity / 8, shard);
  const auto at = [&](int half) {  // in the dense matrix, null outside of it
    const int row = HalfRow(half), col = HalfCol(half);
    return row < patch.rows && col < patch.cols ? patch.data + row * patch.stride + col : nullptr;
  };
  if (kDecode) {
    for (int i = threadIdx.x; i < kBlockWeights; i += kThreads) scratch[i] = 0;
    __syncthreads();
    ForEachWeight<kThreads>(
        b, [&](int position, int64_t i) { scratch[position - kLists] = values[b.value + i]; });
    __syncthreads();
    for (int i = threadIdx.x; i < kBlockWeights; i += kThreads)
      if (uint16_t* to = at(i)) *to = scratch[i];
  } else {
    ForEachWeight<kThreads>(b, [&](int position, int64_t i) {
      if (const uint16_t* from = at(position - kLists)) values[b.value + i] = *from;
    });
  }
}

template <bool kDecode>
cudaError_t Convert(cudaStream_t stream, const Problem& p, const Dense& dense, uint16_t* values) {
  Matrix w = {p.index, p.offsets, p.capacity, p.index_capacity};
  if (p.format == Format::kBitmap) {
    const bitmap::Dims d(p.rows, p.k);
    w.bands = d.bands, w.tiles = d.tiles, w.blocks = d.blocks;
    w.shard_offsets = d.offsets();
    w.blocks_total = p.shards * d.bands * d.blocks;
    const unsigned grid = CeilDiv(w.blocks_total, kThreads / 32);
    const auto kernel =
        IsAligned(dense, 8) ? BitmapConvert<kDecode, true> : BitmapConvert<kDecode, false>;
    return Launch(stream, kernel, dim3(grid), kThreads, 0, false, w, p.shards, dense, values);
  }
  if (!kDecode)
    if (cudaError_t e = cudaMemsetAsync(values, 0, p.shards * p.capacity * 2, stream)) return e;
  const tiled_csl::Dims d(p.rows, p.k);
  w.bands = d.bands, w.blocks = d.blocks;
  w.shard_offsets = d.offsets();
  w.blocks_total = p.shards * d.bands * d.blocks;
  return Launch(stream, TiledCslConvert<kDecode>, dim3(static_cast<unsigned>(w.blocks_total)),
                kThreads, 0, false, w, dense, values);
}

}  // namespace

cudaError_t Decode(cudaStream_t stream, const Problem& p, const Dense& to) {
  return Convert<true>(stream, p, to, const_cast<uint16_t*>(p.values));
}

cudaError_t Sample(cudaStream_t stream, const Problem& p, const Dense& from, uint16_t* values) {
  return Convert<false>(stream, p, from, values);
}

}  // namespace flashllm::cuda
