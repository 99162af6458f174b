// W as a dense matrix, and a dense matrix sampled at W's nonzeros: the gradient of values, and the
// second half of encoding a bitmap.
#include "../bitmap.h"
#include "../delta_csr.h"
#include "delta_csr_item.cuh"
#include "dense.cuh"
#include "ptx.cuh"

namespace flashllm::cuda {
namespace {

// ---- bitmap ----

constexpr int kThreads = 256;

struct Matrix {
  const uint32_t* index;
  const uint32_t* offsets;
  int64_t capacity;          // of a shard, in elements
  int bands, tiles, blocks;  // of a shard; blocks a band
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

// ---- Delta-CSR ----

struct Items {
  const uint32_t* index;
  const uint32_t* offsets;
  int64_t capacity, index_capacity;  // of a shard, in elements
  int64_t total;                     // items of all shards
  uint32_t rows, items;              // of a shard
  int block_cols;
};

// One warp an item, whose row lies in shared memory: a lane walks its list. So much is loaded
// ahead:
constexpr int kRowThreads = 64, kAheadChunks = 4, kAheadGroups = 8;
constexpr int kChunkCols = 256;  // eight a lane

// index: of the item's bases.
template <bool kDecode, int kBits>
__device__ inline void WalkLists(const uint32_t* index, uint16_t* values, int groups, uint16_t* row,
                                 int cols, int lane) {
  using namespace delta_csr;
  using Codes = std::conditional_t<kBits == 8, uint32_t, uint16_t>;  // of a lane in a group
  int col = __ldg(reinterpret_cast<const uint16_t*>(index) + lane) - 1;
  const Codes* codes = reinterpret_cast<const Codes*>(index + kBaseWords) + lane;
  uint2* pairs = reinterpret_cast<uint2*>(values) + lane;
  bool behind_filler = false;
  for (int first = 0; first < groups; first += kAheadGroups) {
    Codes next[kAheadGroups];
    uint2 stored[kAheadGroups];
#pragma unroll
    for (int i = 0; i < kAheadGroups; ++i)
      if (first + i < groups) {
        next[i] = __ldg(codes + (first + i) * kLanes);
        if (kDecode) stored[i] = __ldg(pairs + (first + i) * kLanes);
      }
#pragma unroll
    for (int i = 0; i < kAheadGroups; ++i) {
      if (first + i >= groups) break;
      uint32_t halves[2] = {};
      if (kDecode) halves[0] = stored[i].x, halves[1] = stored[i].y;
#pragma unroll
      for (int e = 0; e < kSteps; ++e) {
        const int code =
            kBits == 8 ? static_cast<int8_t>(next[i] >> (8 * e)) : next[i] >> (4 * e) & 15;
        const bool filler = code == Filler(kBits), live = !filler && (code != 0 || behind_filler);
        behind_filler = filler, col += code;
        if (live && static_cast<unsigned>(col) < static_cast<unsigned>(cols)) {
          if (kDecode)
            row[col] = static_cast<uint16_t>(halves[e / 2] >> (16 * (e % 2)));
          else
            halves[e / 2] |= uint32_t(row[col]) << (16 * (e % 2));
        }
      }
      if (!kDecode) pairs[(first + i) * kLanes] = make_uint2(halves[0], halves[1]);
    }
  }
}

template <bool kDecode, bool kAligned>
__global__ void __launch_bounds__(kRowThreads)
    DeltaCsrConvert(Items w, Dense dense, uint16_t* values) {
  using V = Vector<kAligned, uint4>;
  extern __shared__ __align__(16) uint16_t shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t at = blockIdx.x * (kRowThreads / 32) + warp;
  if (at >= w.total) return;
  const uint32_t shard = at / w.items, item = at % w.items;
  const int64_t block = item / w.rows;
  Patch patch = PatchAt(dense, shard, item % w.rows, block * w.block_cols);
  patch.cols = min(patch.cols, w.block_cols);
  const uint32_t* offsets = w.offsets + shard * (int64_t(w.items) + 2);
  values += shard * w.capacity;
  if (!kDecode) {  // what lies behind a shard's last item
    const int64_t used = int64_t(__ldg(offsets + w.items)) * delta_csr::kGroupValues;
    for (int64_t i = used + int64_t(item) * 32 + lane; i < w.capacity; i += int64_t(w.items) * 32)
      values[i] = 0;
  }
  const int bits = LoadBits(offsets, w.items);
  const DeltaItem from =
      LocateItem(offsets, item, bits, w.block_cols, w.capacity, w.index_capacity);

  uint16_t* row = shared + warp * w.block_cols;
  for (int col = lane * 8; col < w.block_cols; col += kAheadChunks * kChunkCols) {
    uint32_t words[kAheadChunks][4] = {};
#pragma unroll
    for (int i = 0; i < kAheadChunks && !kDecode; ++i)
      LoadRow<V>(patch, 0, col + i * kChunkCols, words[i]);
#pragma unroll
    for (int i = 0; i < kAheadChunks; ++i)
      if (col + i * kChunkCols < w.block_cols)
        *reinterpret_cast<uint4*>(row + col + i * kChunkCols) =
            make_uint4(words[i][0], words[i][1], words[i][2], words[i][3]);
  }
  __syncwarp();
  const uint32_t* index = w.index + shard * w.index_capacity + from.word;
  if (from.groups > 0 && bits == 8)
    WalkLists<kDecode, 8>(index, values + from.value, from.groups, row, w.block_cols, lane);
  else if (from.groups > 0)
    WalkLists<kDecode, 4>(index, values + from.value, from.groups, row, w.block_cols, lane);
  if (!kDecode) return;
  __syncwarp();
  for (int col = lane * 8; col < w.block_cols; col += kChunkCols) {
    const uint4 v = *reinterpret_cast<const uint4*>(row + col);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    StoreRow<V>(patch, 0, col, words);
  }
}

template <bool kDecode>
cudaError_t Convert(cudaStream_t stream, const Problem& p, const Dense& dense, uint16_t* values) {
  if (p.format == Format::kBitmap) {
    const bitmap::Dims d(p.rows, p.k);
    Matrix w = {p.index, p.offsets, p.capacity};
    w.bands = d.bands, w.tiles = d.tiles, w.blocks = d.blocks;
    w.shard_offsets = d.offsets();
    w.blocks_total = p.shards * d.bands * d.blocks;
    const unsigned grid = CeilDiv(w.blocks_total, kThreads / 32);
    const auto kernel =
        IsAligned(dense, 8) ? BitmapConvert<kDecode, true> : BitmapConvert<kDecode, false>;
    return Launch(stream, kernel, dim3(grid), kThreads, 0, false, w, p.shards, dense, values);
  }
  const delta_csr::Dims d(p.rows, p.k);
  const Items w = {p.index,
                   p.offsets,
                   p.capacity,
                   p.index_capacity,
                   p.shards * d.items,
                   static_cast<uint32_t>(d.rows),
                   static_cast<uint32_t>(d.items),
                   static_cast<int>(d.block_cols)};
  const unsigned grid = CeilDiv(w.total, kRowThreads / 32);
  const size_t shared = kRowThreads / 32 * 2 * d.block_cols;  // up to 48 KB
  const auto kernel =
      IsAligned(dense, 8) ? DeltaCsrConvert<kDecode, true> : DeltaCsrConvert<kDecode, false>;
  return Launch(stream, kernel, dim3(grid), kRowThreads, shared, false, w, dense, values);
}

}  // namespace

cudaError_t Decode(cudaStream_t stream, const Problem& p, const Dense& to) {
  return Convert<true>(stream, p, to, const_cast<uint16_t*>(p.values));
}

cudaError_t Sample(cudaStream_t stream, const Problem& p, const Dense& from, uint16_t* values) {
  return Convert<false>(stream, p, from, values);
}

}  // namespace flashllm::cuda
