// Encoding a dense matrix that lies on the GPU, to the same bits as csrc/cpu/encode.cc.
//
//   dense --> [Count*] --> counts --> [ScanCounts] --> offsets       the host reads their end,
//   dense, offsets --> [Sample, or FillTiledCsl] --> values, index   which sizes these
//
// Nothing but results is written: counts become offsets in place.
#include <climits>

#include "../bitmap.h"
#include "../tiled_csl.h"
#include "dense.cuh"
#include "tiled_csl_block.cuh"

namespace flashllm::cuda {
namespace {

// ---- counts to offsets ----

constexpr int kScanThreads = 1024, kScanEach = 4;

// Of each shard, CTA (shard, component): n counts of `width` components become the sums before
// them, and the last element, not yet written, the sum of all.
__global__ void __launch_bounds__(kScanThreads) ScanCounts(uint32_t* counts, int64_t n, int width) {
  __shared__ uint32_t sums[kScanThreads / 32];
  uint32_t* c = counts + blockIdx.x * (n + 1) * width + blockIdx.y;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t before = 0;
  for (int64_t base = 0; base < n; base += kScanThreads * kScanEach) {
    const int64_t first = base + threadIdx.x * kScanEach;
    uint32_t own[kScanEach], total = 0;
#pragma unroll
    for (int i = 0; i < kScanEach; ++i) {
      own[i] = first + i < n ? c[(first + i) * width] : 0;
      total += own[i];
    }
    const auto scan = [&](uint32_t v) {  // inclusive, over the warp
      for (int d = 1; d < 32; d *= 2) {
        const uint32_t up = __shfl_up_sync(~0u, v, d);
        if (lane >= d) v += up;
      }
      return v;
    };
    const uint32_t here = scan(total);
    if (lane == 31) sums[warp] = here;
    __syncthreads();
    const uint32_t warps = scan(sums[lane]);
    uint32_t sum = before + here - total;
    const uint32_t up_to = __shfl_sync(~0u, warps, max(warp - 1, 0));
    if (warp) sum += up_to;
#pragma unroll
    for (int i = 0; i < kScanEach; ++i) {
      if (first + i < n) c[(first + i) * width] = sum;
      sum += own[i];
    }
    before += __shfl_sync(~0u, warps, 31);
    __syncthreads();
  }
  if (threadIdx.x == 0) c[n * width] = before;
}

// ---- bitmap ----

constexpr int kCountThreads = 256;

// One warp a block of 16 x 256: its masks, and how many vectors its values take.
template <bool kAligned>
__global__ void __launch_bounds__(kCountThreads)
    BitmapCount(Dense dense, int bands, int tiles, int blocks, int64_t blocks_total,
                uint32_t* masks, uint32_t* offsets) {
  using namespace bitmap;
  const int lane = threadIdx.x % 32;
  const int64_t index = int64_t(blockIdx.x) * (kCountThreads / 32) + threadIdx.x / 32;
  if (index >= blocks_total) return;
  const int block = static_cast<int>(index % blocks);
  const int64_t band = index / blocks, shard = band / bands;  // bands of all shards
  const Patch patch = PatchAt(dense, shard, band % bands * kBandRows, int64_t(block) * kBlockCols);
  int count = 0;
#pragma unroll
  for (int i = 0; i < kBlockTiles; ++i) {
    const int tile = block * kBlockTiles + i;
    if (tile >= tiles) break;
    uint32_t mask = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t words[8];
      const int row = TileRow(lane, 4 * h), col = i * kTileCols + TileCol(lane, 0, 0);
      LoadRow<Vector<kAligned, uint4>>(patch, row, col, words);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int bit = 8 * (j / 2) + 4 * h + 2 * (j % 2);
        if (words[j] & 0xffff) mask |= 1u << bit;
        if (words[j] >> 16) mask |= 2u << bit;
      }
    }
    masks[(band * tiles + tile) * kLanes + lane] = mask;
    count += __popc(mask);
  }
  count = __reduce_add_sync(~0u, count);
  if (lane == 0)
    offsets[shard * (int64_t(bands) * blocks + 1) + band % bands * blocks + block] =
        static_cast<uint32_t>((count + kVector - 1) / kVector);
}

// ---- Tiled-CSL ----

using tiled_csl::kBlockWeights;
using tiled_csl::kLists;

constexpr int kCslThreads = kLists;  // a thread a list, so neighbouring lanes share a bank

// A block [64, 128] to the order of its scratch, half i of row 1 + i / 64 and list i % 64.
template <bool kAligned>
__device__ inline void LoadBlock(const Patch& patch, uint16_t* scratch) {
  using namespace tiled_csl;
#pragma unroll 4
  for (int i = threadIdx.x; i < kBlockWeights / 8; i += kCslThreads) {
    const int col = i % (kBlockCols / 4) * 4, pair = i / (kBlockCols / 4);
    const int row = pair / 8 * 16 + pair % 8;  // and row + 8
    uint32_t top[2], bottom[2];
    LoadRow<Vector<kAligned, uint2>>(patch, row, col, top);
    LoadRow<Vector<kAligned, uint2>>(patch, row + 8, col, bottom);
    *reinterpret_cast<uint4*>(scratch + Half(row, col)) =
        make_uint4(top[0], bottom[0], top[1], bottom[1]);
  }
  __syncthreads();
}

// A list's entries one after another: weights, and fillers on the way to them.
struct Walk {
  uint64_t low, high;  // weights to come: bit i is row 1 + i
  int row;             // of the last entry; 0 at first

  __device__ static Walk Of(const uint16_t* scratch, int list) {
    Walk w = {};
#pragma unroll 8
    for (int i = 0; i < 64; ++i) {
      w.low |= uint64_t(scratch[i * kLists + list] != 0) << i;
      w.high |= uint64_t(scratch[(64 + i) * kLists + list] != 0) << i;
    }
    return w;
  }
  __device__ bool More() const { return (low | high) != 0; }
  __device__ int Next(bool* weight) {  // its code
    const int far = (low ? __ffsll(low) : 64 + __ffsll(high)) - row;
    *weight = far < tiled_csl::kFiller;
    if (!*weight) {
      row += tiled_csl::kFiller;
      return tiled_csl::kFiller;
    }
    row += far;
    if (low)
      low &= low - 1;
    else
      high &= high - 1;
    return far;
  }
};

struct CslGrid {
  int bands, blocks;  // of a shard; blocks a band
};

struct CslPlace {
  int64_t shard, block;  // block: in its shard
  Patch patch;
};

__device__ inline CslPlace CslBlockOf(const Dense& dense, const CslGrid& g) {
  const int64_t band = blockIdx.x / g.blocks, block = blockIdx.x % g.blocks;
  return {band / g.bands, band % g.bands * g.blocks + block,
          PatchAt(dense, band / g.bands, band % g.bands * tiled_csl::kBlockRows,
                  block * tiled_csl::kBlockCols)};
}

// One CTA a block: the number of chunks that takes the fewest bytes, of equals the most.
template <bool kAligned>
__global__ void __launch_bounds__(kCslThreads)
    TiledCslCount(Dense dense, CslGrid grid, uint32_t* offsets) {
  using namespace tiled_csl;
  alignas(16) __shared__ uint16_t scratch[kBlockWeights];
  __shared__ int weights[2][kMaxChunks];  // in a chunk of the lists of each warp
  const CslPlace place = CslBlockOf(dense, grid);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  weights[warp][lane] = 0;
  LoadBlock<kAligned>(place.patch, scratch);
  Walk walk = Walk::Of(scratch, threadIdx.x);
  // A list has 128 entries at most: a filler stands for 15 rows.
  for (int chunk = 0; __any_sync(~0u, walk.More()); ++chunk) {
    int n = 0;
    for (int e = 0; e < kChunkEntries && walk.More(); ++e) {
      bool weight;
      walk.Next(&weight);
      n += weight;
    }
    n = __reduce_add_sync(~0u, n);
    if (lane == 0) weights[warp][chunk] = n;
  }
  __syncthreads();
  if (threadIdx.x) return;
  constexpr int kChunkBytes = 2 * kChunkValues + 4 * kChunkWords;
  constexpr int kTailBytes = 2 * kVector + 4 * kVectorWords;
  int overflow = 0, least = INT_MAX, best_chunks = 0, best_tails = 0;
  for (int chunks = kMaxChunks; chunks >= 0; --chunks) {
    const int tails = (overflow + kVector - 1) / kVector;
    const int bytes = chunks * kChunkBytes + tails * kTailBytes;
    if (bytes < least) best_chunks = chunks, best_tails = tails, least = bytes;
    if (chunks) overflow += weights[0][chunks - 1] + weights[1][chunks - 1];
  }
  uint32_t* o = offsets + 2 * (place.shard * (int64_t(grid.bands) * grid.blocks + 1) + place.block);
  o[0] = best_chunks, o[1] = best_tails;
}

// Zeroes what lies behind a shard's last block.
template <typename T>
__device__ inline void ClearFrom(T* buffer, int64_t used, int64_t capacity) {
  for (int64_t i = used + int64_t(blockIdx.x) * kCslThreads + threadIdx.x; i < capacity;
       i += int64_t(gridDim.x) * kCslThreads)
    buffer[i] = 0;
}

template <bool kAligned>
__global__ void __launch_bounds__(kCslThreads)
    TiledCslFill(Dense dense, CslGrid grid, int64_t shards, const uint32_t* offsets,
                 int64_t capacity, int64_t index_capacity, uint32_t* index, uint16_t* values) {
  using namespace tiled_csl;
  alignas(16) __shared__ uint16_t scratch[kBlockWeights];
  __shared__ int bank_tails[kLists / 2];
  // Weights of a bank's tail go one to a round: which banks take part, and how many weights the
  // rounds before have.
  __shared__ uint32_t round_banks[2 * kRows];
  __shared__ int round_start[2 * kRows + 1];
  const int64_t shard_offsets = 2 * (int64_t(grid.bands) * grid.blocks + 1);
  for (int64_t s = 0; s < shards; ++s) {
    const uint32_t* end = offsets + (s + 1) * shard_offsets - 2;
    ClearFrom(values + s * capacity, ValueStart(end[0], end[1]), capacity);
    ClearFrom(index + s * index_capacity, IndexStart(end[0], end[1]), index_capacity);
  }
  const CslPlace place = CslBlockOf(dense, grid);
  const CslBlock b =
      LocateBlock(index, LoadOffsets(offsets + place.shard * shard_offsets + 2 * place.block),
                  index_capacity / 4, capacity / 8, place.shard);
  LoadBlock<kAligned>(place.patch, scratch);
  const int list = threadIdx.x, bank = list / 2, entries = b.chunks * kChunkEntries;
  Walk walk = Walk::Of(scratch, list);

  // Lists end with the last chunk, so padding comes first.
  int kept = 0;  // entries up to the last weight that fits
  Walk ahead = walk;
  for (int slot = 1; slot <= entries && ahead.More(); ++slot) {
    bool weight;
    ahead.Next(&weight);
    if (weight) kept = slot;
  }
  const int padding = entries - kept;
  uint16_t* block_values = values + b.value;
  uint32_t* block_index = const_cast<uint32_t*>(b.index);
  for (int chunk = 0; chunk < b.chunks; ++chunk) {
    uint32_t codes = 0;
    uint32_t pair[2] = {};
#pragma unroll
    for (int e = 0; e < kChunkEntries; ++e) {
      if (chunk * kChunkEntries + e < padding) continue;
      bool weight;
      codes |= walk.Next(&weight) << (8 * e + 4 * (list % 2));
      if (weight)
        pair[e / 2] |= uint32_t(scratch[(walk.row - 1) * kLists + list]) << (16 * (e % 2));
    }
    *reinterpret_cast<uint2*>(block_values + chunk * kChunkValues + list % 2 * (kChunkValues / 2) +
                              bank * kChunkEntries) = make_uint2(pair[0], pair[1]);
    codes |= __shfl_xor_sync(~0u, codes, 1);
    if (list % 2 == 0) block_index[chunk * kChunkWords + bank] = codes;
  }

  // The tail: what is left, round by round over the banks.
  if (b.tails == 0) return;
  const uint64_t low = __shfl_xor_sync(~0u, walk.low, 1), high = __shfl_xor_sync(~0u, walk.high, 1);
  if (list % 2 == 0)
    bank_tails[bank] = __popcll(walk.low) + __popcll(walk.high) + __popcll(low) + __popcll(high);
  __syncthreads();
  if (threadIdx.x < 32) {
    const int own = bank_tails[threadIdx.x];
    int start = 0, round = 0;
    for (uint32_t banks; (banks = __ballot_sync(~0u, own > round)) != 0; ++round) {
      round_banks[round] = banks, round_start[round] = start;
      start += __popc(banks);
    }
    if (threadIdx.x == 0) round_start[2 * kRows] = start;  // all of them
  }
  __syncthreads();
  block_values += b.chunks * kChunkValues;
  uint16_t* positions = reinterpret_cast<uint16_t*>(block_index + b.chunks * kChunkWords);
  const int room = b.tails * kVector;
  for (int own = 0; walk.More(); ++own) {
    const int i = walk.low ? __ffsll(walk.low) - 1 : 63 + __ffsll(walk.high);
    if (walk.low)
      walk.low &= walk.low - 1;
    else
      walk.high &= walk.high - 1;
    // A row's weight in the even list comes first.
    const int before = i + list % 2;
    const uint64_t of_low = before >= 64 ? ~0ull : (1ull << before) - 1;
    const uint64_t of_high = before <= 64 ? 0 : before >= 128 ? ~0ull : (1ull << (before - 64)) - 1;
    const int round = own + __popcll(low & of_low) + __popcll(high & of_high);
    const int at = round_start[round] + __popc(round_banks[round] & ((1u << bank) - 1));
    if (at >= room) break;  // only where offsets are not this matrix's
    block_values[at] = scratch[i * kLists + list];
    positions[at] = static_cast<uint16_t>((i + 1) * kLists + list);
  }
  for (int i = round_start[2 * kRows] + threadIdx.x; i < room; i += kCslThreads)
    block_values[i] = positions[i] = 0;
}

CslGrid GridOf(const tiled_csl::Dims& d) {
  return {static_cast<int>(d.bands), static_cast<int>(d.blocks)};
}

cudaError_t Scan(cudaStream_t stream, uint32_t* counts, int64_t shards, int64_t n, int width) {
  return Launch(stream, ScanCounts, dim3(static_cast<unsigned>(shards), width), kScanThreads, 0,
                false, counts, n, width);
}

}  // namespace

cudaError_t CountBitmap(cudaStream_t stream, const Dense& from, int64_t shards, uint32_t* masks,
                        uint32_t* offsets) {
  const bitmap::Dims d(from.shard_rows, from.shard_cols);
  const int64_t blocks = shards * d.bands * d.blocks;
  const auto kernel = IsAligned(from, 8) ? BitmapCount<true> : BitmapCount<false>;
  if (cudaError_t e =
          Launch(stream, kernel, dim3(static_cast<unsigned>(CeilDiv(blocks, kCountThreads / 32))),
                 kCountThreads, 0, false, from, static_cast<int>(d.bands),
                 static_cast<int>(d.tiles), static_cast<int>(d.blocks), blocks, masks, offsets))
    return e;
  return Scan(stream, offsets, shards, d.bands * d.blocks, 1);
}

cudaError_t CountTiledCsl(cudaStream_t stream, const Dense& from, int64_t shards,
                          uint32_t* offsets) {
  const tiled_csl::Dims d(from.shard_rows, from.shard_cols);
  const auto kernel = IsAligned(from, 4) ? TiledCslCount<true> : TiledCslCount<false>;
  if (cudaError_t e =
          Launch(stream, kernel, dim3(static_cast<unsigned>(shards * d.bands * d.blocks)),
                 kCslThreads, 0, false, from, GridOf(d), offsets))
    return e;
  return Scan(stream, offsets, shards, d.bands * d.blocks, 2);
}

cudaError_t FillTiledCsl(cudaStream_t stream, const Problem& p, const Dense& from, uint32_t* index,
                         uint16_t* values) {
  const tiled_csl::Dims d(from.shard_rows, from.shard_cols);
  const auto kernel = IsAligned(from, 4) ? TiledCslFill<true> : TiledCslFill<false>;
  return Launch(stream, kernel, dim3(static_cast<unsigned>(p.shards * d.bands * d.blocks)),
                kCslThreads, 0, false, from, GridOf(d), p.shards, p.offsets, p.capacity,
                p.index_capacity, index, values);
}

}  // namespace flashllm::cuda
