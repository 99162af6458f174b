// Encoding a dense matrix that lies on the GPU, to the same bits as csrc/cpu/encode.cc.
//
//   dense --> [Count*] --> counts --> [ScanCounts] --> offsets       the host reads their end,
//   dense, offsets --> [Sample, or FillDeltaCsr] --> values, index   which sizes these
//
// Nothing but results is written: counts become offsets in place.
#include "../bitmap.h"
#include "../delta_csr.h"
#include "delta_csr_item.cuh"
#include "dense.cuh"

namespace flashllm::cuda {
namespace {

// ---- counts to offsets ----

constexpr int kScanThreads = 1024, kScanEach = 4;

// The threads' sum, to each of them.
__device__ inline uint64_t SumOfCta(uint64_t v, uint64_t (&sums)[kScanThreads / 32]) {
  const auto sum = [](uint64_t v) {
    for (int d = 16; d; d /= 2) v += __shfl_xor_sync(~0u, v, d);
    return v;
  };
  v = sum(v);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
  __syncthreads();
  return sum(sums[threadIdx.x % 32]);
}

// One CTA a shard: n counts become the sums before them, and the last element, not yet written,
// the sum of all. A count of Delta-CSR is two of 16 bits, the lower one with codes of 8 bits, the
// upper one of 4; those of one width become sums, and behind them the width is written.
template <bool kDeltaCsr>
__global__ void __launch_bounds__(kScanThreads) ScanCounts(uint32_t* counts, int64_t n) {
  __shared__ uint32_t sums[kScanThreads / 32];
  uint32_t* c = counts + blockIdx.x * (n + (kDeltaCsr ? 2 : 1));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int bits = 8;
  if (kDeltaCsr) {
    __shared__ uint64_t of_warps[kScanThreads / 32];
    uint64_t both = 0;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < n; i += kScanThreads)
      both += (c[i] & 0xffff) | uint64_t(c[i] >> 16) << 32;
    both = SumOfCta(both, of_warps);
    bits = delta_csr::Bits(both & 0xffffffff, both >> 32);
  }
  const auto count = [&](int64_t i) {
    return !kDeltaCsr ? c[i] : bits == 8 ? c[i] & 0xffff : c[i] >> 16;
  };
  uint32_t before = 0;
  for (int64_t base = 0; base < n; base += kScanThreads * kScanEach) {
    const int64_t first = base + threadIdx.x * kScanEach;
    uint32_t own[kScanEach], total = 0;
#pragma unroll
    for (int i = 0; i < kScanEach; ++i) {
      own[i] = first + i < n ? count(first + i) : 0;
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
      if (first + i < n) c[first + i] = sum;
      sum += own[i];
    }
    before += __shfl_sync(~0u, warps, 31);
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    c[n] = before;
    if (kDeltaCsr) c[n + 1] = bits;
  }
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

// ---- Delta-CSR ----

// A CTA has an item, a warp so many neighbouring chunks of it, in registers: W is read once.
constexpr int kItemWarps = 8, kItemThreads = 32 * kItemWarps;
constexpr int kLaneCols = 8, kChunkCols = 32 * kLaneCols;
constexpr int kMaxChunks = delta_csr::kMaxBlockCols / (kItemWarps * kChunkCols);
static_assert(kMaxChunks * kItemWarps * kChunkCols == delta_csr::kMaxBlockCols);
static_assert(kLaneCols <= delta_csr::Filler(4));  // no fillers inside of a lane

struct Items {
  uint32_t rows, items;    // of a shard
  int block_cols, chunks;  // of a warp
  static Items Of(const delta_csr::Dims& d) {
    return {static_cast<uint32_t>(d.rows), static_cast<uint32_t>(d.items),
            static_cast<int>(d.block_cols),
            static_cast<int>(CeilDiv(d.block_cols, kItemWarps * kChunkCols))};
  }
};

// What a warp's part of an item holds: its first weight's column, -1 if there is none, its last
// one's, and entries with codes of 8 and of 4 bits but for the fillers before the first weight.
struct Part {
  int first, last, entries[2];
};

struct ItemRow {
  uint32_t words[kMaxChunks][kLaneCols / 2];
  int chunks, col;  // col: of this lane in the first chunk

  template <bool kAligned>
  __device__ static ItemRow Load(const Dense& dense, const Items& w, uint32_t shard,
                                 uint32_t item) {
    const int64_t block = item / w.rows;
    Patch patch = PatchAt(dense, shard, item % w.rows, block * w.block_cols);
    patch.cols = min(patch.cols, w.block_cols);
    const int part = threadIdx.x / 32 * w.chunks * kChunkCols;
    ItemRow r;
    r.chunks = w.chunks, r.col = part + threadIdx.x % 32 * kLaneCols;
#pragma unroll
    for (int c = 0; c < kMaxChunks; ++c)
      if (c < w.chunks)
        LoadRow<Vector<kAligned, uint4>>(patch, 0, r.col + c * kChunkCols, r.words[c]);
    return r;
  }

  // f(chunk, the lane's column, mask of its weights, column of the last weight before them or -1)
  // for all chunks, by rising column. `last` is of the warps before.
  template <typename F>
  __device__ void ForEachChunk(int last, F f) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int c = 0; c < kMaxChunks; ++c) {
      if (c >= chunks) break;
      uint32_t mask = 0;
#pragma unroll
      for (int j = 0; j < kLaneCols / 2; ++j) {
        if (words[c][j] & 0xffff) mask |= 1u << (2 * j);
        if (words[c][j] >> 16) mask |= 2u << (2 * j);
      }
      const int at = col + c * kChunkCols;
      const uint32_t lanes = __ballot_sync(~0u, mask != 0), before = lanes & ((1u << lane) - 1);
      const int own = at + 31 - __clz(mask);
      const int lower = __shfl_sync(~0u, own, before ? 31 - __clz(before) : 0);
      const int highest = __shfl_sync(~0u, own, lanes ? 31 - __clz(lanes) : 0);
      f(c, at, mask, before ? lower : last);
      if (lanes) last = highest;
    }
  }

  __device__ Part Count() const {
    Part p = {-1, -1, {0, 0}};
    ForEachChunk(-1, [&](int, int at, uint32_t mask, int before) {
      if (!mask) return;
      const int first = at + __ffs(mask) - 1;
      p.last = at + 31 - __clz(mask);
      if (p.first < 0) p.first = first;
      const int gap = before < 0 ? 0 : first - before, weights = __popc(mask);
      p.entries[0] += weights + delta_csr::Fillers(gap, 8);
      p.entries[1] += weights + delta_csr::Fillers(gap, 4);
    });
    // No first is the highest as an unsigned number, no last the lowest as a signed one.
    p.first = static_cast<int>(__reduce_min_sync(~0u, static_cast<uint32_t>(p.first)));
    p.last = __reduce_max_sync(~0u, p.last);
    for (int& n : p.entries) n = __reduce_add_sync(~0u, n);
    return p;
  }
};

// The entries of an item, or of what warps before this one have, and the last weight's column.
struct Prefix {
  int entries = 0, last = -1;
  __device__ void Add(const Part& p, int bits) {
    if (p.first < 0) return;
    if (last >= 0) entries += delta_csr::Fillers(p.first - last, bits);
    entries += p.entries[bits == 4], last = p.last;
  }
};

template <bool kAligned>
__global__ void __launch_bounds__(kItemThreads)
    DeltaCsrCount(Dense dense, Items w, uint32_t* offsets) {
  __shared__ Part parts[kItemWarps];
  const uint32_t shard = blockIdx.x / w.items, item = blockIdx.x % w.items;
  const Part own = ItemRow::Load<kAligned>(dense, w, shard, item).Count();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = own;
  __syncthreads();
  if (threadIdx.x) return;
  Prefix wide, narrow;
  for (const Part& p : parts) wide.Add(p, 8), narrow.Add(p, 4);
  offsets[shard * (int64_t(w.items) + 2) + item] = static_cast<uint32_t>(
      delta_csr::Groups(wide.entries) | delta_csr::Groups(narrow.entries) << 16);
}

// An item as it is put together in shared memory. Groups are spread out, so that a list's entries
// lie in different banks: threads write neighbouring ones.
struct Stage {
  static constexpr int kValueStride = delta_csr::kGroupValues + 4;  // halves
  static constexpr int kCodeStride = delta_csr::kGroupValues + 4;   // bytes
  static constexpr int kGroupBytes = 2 * kValueStride + kCodeStride;

  uint16_t* values;
  uint8_t* codes;   // 8 bits each, of either width
  uint16_t* bases;  // of lists
  int entries, groups;
  float inverse;

  __device__ static Stage At(uint8_t* shared, int groups) {
    Stage s;
    s.bases = reinterpret_cast<uint16_t*>(shared);
    s.values = s.bases + delta_csr::kLanes;
    s.codes = reinterpret_cast<uint8_t*>(s.values + groups * kValueStride);
    s.groups = groups;
    return s;
  }
  static int Bytes(int64_t groups) {
    return static_cast<int>(2 * delta_csr::kLanes + groups * kGroupBytes);
  }
  __device__ void Clear() const {
    uint32_t* words = reinterpret_cast<uint32_t*>(bases);
    const int n = (2 * delta_csr::kLanes + groups * kGroupBytes) / 4;
    for (int i = threadIdx.x; i < n; i += kItemThreads) words[i] = 0;
  }
  __device__ void SetEntries(int n) { entries = n, inverse = 1.0f / n; }
  // As delta_csr::LaneStart has it. Exact: quotients are below 32, and half a step of 1 / 12288 at
  // least from the next integer, which float's 2^-23 does not bridge.
  __device__ int List(int entry) const {
    return static_cast<int>((entry * delta_csr::kLanes + (delta_csr::kLanes - 0.5f)) * inverse);
  }
  __device__ void Put(int entry, int list, int code, uint32_t value) const {
    const uint32_t i = entry - list * uint32_t(entries) / delta_csr::kLanes;
    const uint32_t group = i / delta_csr::kSteps,
                   at = list * delta_csr::kSteps + i % delta_csr::kSteps;
    if (group >= uint32_t(groups)) return;  // only where offsets are not this matrix's
    codes[group * kCodeStride + at] = static_cast<uint8_t>(code);
    values[group * kValueStride + at] = static_cast<uint16_t>(value);
  }
};

// A warp's part of an item to the stage. prefix: of the warps before.
template <int kBits>
__device__ inline void PutPart(const ItemRow& row, Prefix prefix, const Stage& stage) {
  using namespace delta_csr;
  const int lane = threadIdx.x % 32;
  int start = prefix.entries;  // of the chunk
  row.ForEachChunk(prefix.last, [&](int c, int at, uint32_t mask, int before) {
    const int gap = mask && before >= 0 ? at + __ffs(mask) - 1 - before : 0;
    const int fillers = Fillers(gap, kBits), own = fillers + __popc(mask);
    int upto = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int up = __shfl_up_sync(~0u, upto, d);
      if (lane >= d) upto += up;
    }
    int entry = start + upto - own;  // of the first filler
    start += __shfl_sync(~0u, upto, 31);
    if (!mask) return;
    int list = before < 0 ? -1 : stage.List(entry - 1);
    if (fillers && list == stage.List(entry + fillers))
      for (int i = 0; i < fillers; ++i) stage.Put(entry + i, list, Filler(kBits), 0);
    entry += fillers, before += fillers * Filler(kBits);
#pragma unroll
    for (int i = 0; i < kLaneCols; ++i) {
      if (!(mask >> i & 1)) continue;
      const int to = stage.List(entry), here = at + i;
      if (to != list) stage.bases[to] = static_cast<uint16_t>(here);
      stage.Put(entry, to, to == list ? here - before : 1, row.words[c][i / 2] >> (16 * (i % 2)));
      list = to, before = here, ++entry;
    }
  });
}

// Zeroes what lies behind a shard's last item, by all CTAs of the shard.
template <typename T>
__device__ inline void ClearFrom(T* buffer, int64_t used, int64_t capacity, int64_t cta,
                                 int64_t ctas) {
  for (int64_t i = used + cta * kItemThreads + threadIdx.x; i < capacity; i += ctas * kItemThreads)
    buffer[i] = 0;
}

template <bool kAligned>
__global__ void __launch_bounds__(kItemThreads, 4)  // a tenth faster than three of them
    DeltaCsrFill(Dense dense, Items w, const uint32_t* offsets, int64_t capacity,
                 int64_t index_capacity, uint32_t* index, uint16_t* values) {
  using namespace delta_csr;
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ Part parts[kItemWarps];
  const uint32_t shard = blockIdx.x / w.items, item = blockIdx.x % w.items;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  offsets += shard * (int64_t(w.items) + 2), values += shard * capacity,
      index += shard * index_capacity;
  const int bits = LoadBits(offsets, w.items);
  const int64_t all = __ldg(offsets + w.items);
  ClearFrom(values, all * kGroupValues, capacity, item, w.items);
  ClearFrom(index, IndexStart(w.items, all, bits), index_capacity, item, w.items);
  const DeltaItem to = LocateItem(offsets, item, bits, w.block_cols, capacity, index_capacity);
  if (to.groups < 0) return;

  const ItemRow row = ItemRow::Load<kAligned>(dense, w, shard, item);
  Stage stage = Stage::At(shared, to.groups);
  stage.Clear();
  const Part own = row.Count();
  if (lane == 0) parts[warp] = own;
  __syncthreads();
  Prefix prefix, whole;
#pragma unroll
  for (int i = 0; i < kItemWarps; ++i) {
    if (i == warp) prefix = whole;
    whole.Add(parts[i], bits);
  }
  stage.SetEntries(whole.entries);
  if (bits == 8)
    PutPart<8>(row, prefix, stage);
  else
    PutPart<4>(row, prefix, stage);
  __syncthreads();

  index += to.word, values += to.value;
  if (threadIdx.x < kBaseWords)
    index[threadIdx.x] = reinterpret_cast<const uint32_t*>(stage.bases)[threadIdx.x];
  index += kBaseWords;
  for (int group = warp; group < to.groups; group += kItemWarps) {
    reinterpret_cast<uint2*>(values)[group * kLanes + lane] =
        reinterpret_cast<const uint2*>(stage.values + group * Stage::kValueStride)[lane];
    const uint32_t codes =
        reinterpret_cast<const uint32_t*>(stage.codes + group * Stage::kCodeStride)[lane];
    if (bits == 8)
      index[group * kLanes + lane] = codes;
    else
      reinterpret_cast<uint16_t*>(index)[group * kLanes + lane] = static_cast<uint16_t>(
          (codes & 15) | (codes >> 4 & 0xf0) | (codes >> 8 & 0xf00) | (codes >> 12 & 0xf000));
  }
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
  return Launch(stream, ScanCounts<false>, dim3(static_cast<unsigned>(shards)), kScanThreads, 0,
                false, offsets, d.bands * d.blocks);
}

cudaError_t CountDeltaCsr(cudaStream_t stream, const Dense& from, int64_t shards,
                          uint32_t* offsets) {
  const delta_csr::Dims d(from.shard_rows, from.shard_cols);
  const auto kernel = IsAligned(from, kLaneCols) ? DeltaCsrCount<true> : DeltaCsrCount<false>;
  if (cudaError_t e = Launch(stream, kernel, dim3(static_cast<unsigned>(shards * d.items)),
                             kItemThreads, 0, false, from, Items::Of(d), offsets))
    return e;
  return Launch(stream, ScanCounts<true>, dim3(static_cast<unsigned>(shards)), kScanThreads, 0,
                false, offsets, d.items);
}

cudaError_t FillDeltaCsr(cudaStream_t stream, const Problem& p, const Dense& from, uint32_t* index,
                         uint16_t* values) {
  const delta_csr::Dims d(from.shard_rows, from.shard_cols);
  const auto kernel = IsAligned(from, kLaneCols) ? DeltaCsrFill<true> : DeltaCsrFill<false>;
  return Launch(stream, kernel, dim3(static_cast<unsigned>(p.shards * d.items)), kItemThreads,
                Stage::Bytes(delta_csr::Groups(d.block_cols)), false, from, Items::Of(d), p.offsets,
                p.capacity, p.index_capacity, index, values);
}

}  // namespace flashllm::cuda
