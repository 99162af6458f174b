// CPU handlers: y = act(x W^T + bias), W to dense, and a dense matrix sampled at W's
// nonzeros (the gradient of the values). Bands of W run in parallel; each sums in fp32.
#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

#include "../ffi_checks.h"
#include "handlers.h"
#include "kernels.h"
#include "parallel.h"

namespace flashllm {
namespace {

using ffi::AnyBuffer;
using ffi::DataType;
using Words = ffi::Buffer<DataType::U32>;

enum Activation : int64_t { kNone = 0, kRelu = 1, kGelu = 2 };

// Below this many weight-token products a second thread costs more than it brings.
constexpr int64_t kSerialWork = 1 << 18;

std::atomic<const Kernels*> g_kernels{nullptr};

const Kernels* Best() {
#ifdef FLASHLLM_X86
  __builtin_cpu_init();
  // What CMakeLists.txt compiles the two files for.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vbmi2"))
    return &kAvx512Kernels;
  if (avx2) return &kAvx2Kernels;
#endif
  return &kPortableKernels;
}

}  // namespace

const Kernels& Active() {
  const Kernels* k = g_kernels.load();
  if (!k) g_kernels.store(k = Best());
  return *k;
}

namespace {

bool HasBf16Dot() {
#ifdef FLASHLLM_X86
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

// ---- x ----

struct Activations {
  const void* data;
  DataType type;
  int64_t tokens, k;

  float Get(int64_t i) const {
    switch (type) {
      case DataType::F16:
        return F16ToFloat(static_cast<const uint16_t*>(data)[i]);
      case DataType::BF16:
        return BF16ToFloat(static_cast<const uint16_t*>(data)[i]);
      default:
        return static_cast<const float*>(data)[i];
    }
  }
};

// Columns col.. of a token as floats, zero past K.
void LoadColumns(const Activations& x, int64_t token, int64_t col, int n, float* out) {
  for (int j = 0; j < n; ++j) out[j] = col + j < x.k ? x.Get(token * x.k + col + j) : 0.0f;
}

struct XFlags {
  std::atomic<bool> non_finite{false}, subnormal{false};
};

// One tile of x for a group of tokens, in the layout of kernels.h.
template <typename Out, typename Convert>
void PackTile(const Activations& x, int64_t first, int tokens, int64_t tile, Out* out,
              XFlags& flags, Convert convert) {
  float row[bitmap::kTileCols];
  for (int t = 0; t < tokens; ++t) {
    LoadColumns(x, first + t, tile * bitmap::kTileCols, bitmap::kTileCols, row);
    uint32_t any_inf = 0, any_sub = 0;
    for (float v : row) {
      const uint32_t a = FloatToBits(v) & 0x7fffffff;
      any_inf |= a >= 0x7f800000;
      any_sub |= a - 1 < 0x007fffff;
    }
    if (any_inf) flags.non_finite = true;
    if (any_sub) flags.subnormal = true;
    for (int i = 0; i < bitmap::kSteps; ++i)
      for (int q = 0; q < 4; ++q)
        for (int j = 0; j < 4; ++j) {
          Out* o = out + (i * tokens + t) * 32 + q * 8 + j;
          o[0] = o[4] = convert(row[16 * q + 4 * i + j]);
        }
  }
}

// ---- y ----

struct Output {
  void* data;
  DataType type;
  int64_t stride;  // S * R
  const void* bias;
  DataType bias_type;
  int64_t activation;

  void Store(int64_t token, int64_t row, const float* sums, int64_t n) const {
    const Activations b{bias, bias_type, 1, stride};
    for (int64_t i = 0; i < n; ++i) {
      float v = sums[i];
      if (bias) v += b.Get(row + i);
      if (activation == kRelu) v = v < 0 ? 0.0f : v;  // NaN stays NaN
      if (activation == kGelu) v = 0.5f * v * (1.0f + std::erf(v * 0.70710678118654752f));
      const int64_t at = token * stride + row + i;
      switch (type) {
        case DataType::F16:
          static_cast<uint16_t*>(data)[at] = FloatToF16(v);
          break;
        case DataType::BF16:
          static_cast<uint16_t*>(data)[at] = FloatToBF16(v);
          break;
        default:
          static_cast<float*>(data)[at] = v;
      }
    }
  }
};

// Scratch that lives as long as its thread: no allocation in a decode step's 40 products.
// Aligned to cache lines, which a vector load that straddles would pay for twice.
template <typename T>
T* Scratch(size_t n) {
  struct Free {
    void operator()(T* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<T[], Free> buffer;
  thread_local size_t size = 0;
  if (size < n) {
    buffer.reset(static_cast<T*>(::operator new[](n * sizeof(T), std::align_val_t(64))));
    size = n;
  }
  return buffer.get();
}

struct Weight {
  Shards shards;
  int64_t k;
  bool bf16;
  const uint16_t* values;
};

// ---- formats ----

struct BitmapWeight : Weight {
  static constexpr int kRows = bitmap::kBandRows;
  const uint32_t* masks;
  const uint32_t* offsets;
  bitmap::Dims dims;

  // f(row, col, index into the shard's values) for every stored weight of a band.
  template <typename F>
  Status Walk(int64_t shard, int64_t band, F f) const {
    using namespace bitmap;
    const uint32_t* m = masks + shard * dims.masks() + band * dims.tiles * kLanes;
    const uint32_t* o = offsets + shard * dims.offsets() + band * dims.blocks;
    int64_t at = 0;
    for (int64_t tile = 0; tile < dims.tiles; ++tile, m += kLanes) {
      if (tile % kBlockTiles == 0) at = static_cast<int64_t>(o[tile / kBlockTiles]) * kVector;
      for (int i = 0; i < kSteps; ++i)
        for (int lane = 0; lane < kLanes; ++lane)
          for (uint32_t byte = m[lane] >> (8 * i) & 0xff; byte; byte &= byte - 1, ++at) {
            if (at >= shards.capacity) return Status::kOutOfRange;
            const int bit = __builtin_ctz(byte);
            f(TileRow(lane, bit), tile * kTileCols + TileCol(lane, i, bit), at);
          }
    }
    return Status::kOk;
  }
};

struct TiledCslWeight : Weight {
  static constexpr int kRows = tiled_csl::kBlockRows;
  const uint32_t* index;
  int64_t index_capacity;
  const uint32_t* offsets;
  tiled_csl::Dims dims;

  struct Block {
    const uint32_t* index;
    int64_t value;  // the block's first, counted from the shard's
    int chunks, tails;
  };

  // False if the offsets point outside the buffers.
  bool Locate(int64_t shard, int64_t band, int64_t block, Block* b) const {
    using namespace tiled_csl;
    const uint32_t* o = offsets + shard * dims.offsets() + 2 * (band * dims.blocks + block);
    const int64_t c0 = o[0], t0 = o[1], c1 = o[2], t1 = o[3];
    *b = {index + shard * index_capacity + IndexStart(c0, t0), ValueStart(c0, t0),
          static_cast<int>(c1 - c0), static_cast<int>(t1 - t0)};
    return c0 <= c1 && c1 - c0 <= kMaxChunks && t0 <= t1 && t1 - t0 <= kMaxTail &&
           ValueStart(c1, t1) <= shards.capacity && IndexStart(c1, t1) <= index_capacity;
  }

  // f(row 0..127, list, index into the shard's values) for every stored weight of a block.
  template <typename F>
  static Status WalkBlock(const Block& b, F f) {
    using namespace tiled_csl;
    uint8_t rows[kLists] = {}, codes[kLists] = {};  // of the entry before
    const uint32_t* words = b.index;
    int64_t at = b.value;
    for (int chunk = 0; chunk < b.chunks; ++chunk, at += kChunkValues)
      for (int bank = 0; bank < kLists / 2; ++bank, ++words)
        for (int list = 0; list < 2; ++list) {
          unsigned row = rows[2 * bank + list], before = codes[2 * bank + list];
#pragma GCC unroll 4
          for (int i = 0; i < kChunkEntries; ++i) {
            const unsigned code = *words >> (8 * i + 4 * list) & 15;
            const bool live = code ? code != kFiller : before == kFiller;
            if ((row += code) > tiled_csl::kRows) return Status::kOutOfRange;
            if (live)
              f(row - 1, 2u * bank + list,
                at + list * (kChunkValues / 2) + bank * kChunkEntries + i);
            before = code;
          }
          rows[2 * bank + list] = static_cast<uint8_t>(row);
          codes[2 * bank + list] = static_cast<uint8_t>(before);
        }
    for (int i = 0; i < b.tails * kVector; ++i, ++at) {
      const unsigned position = words[i / 2] >> (16 * (i % 2)) & 0xffff;
      if (position >= kLists + kBlockWeights) return Status::kOutOfRange;
      if (position >= kLists) f(position / kLists - 1, position % kLists, at);
    }
    return Status::kOk;
  }

  // As a bitmap's: f(row, col, index into the shard's values).
  template <typename F>
  Status Walk(int64_t shard, int64_t band, F f) const {
    using namespace tiled_csl;
    for (int64_t block = 0; block < dims.blocks; ++block) {
      Block b;
      if (!Locate(shard, band, block, &b)) return Status::kOutOfRange;
      const Status status = WalkBlock(b, [&](unsigned row, unsigned list, int64_t at) {
        const int half = row * kLists + list;
        f(HalfRow(half), block * kBlockCols + HalfCol(half), at);
      });
      if (status != Status::kOk) return status;
    }
    return Status::kOk;
  }
};

// Kernels that skip zeros get a token with Inf or NaN wrong, since 0 * Inf is NaN: such a
// group is multiplied with every zero present. Rare, so written for clearness.
template <typename W>
Status DenseBand(const W& w, int64_t shard, int64_t band, const Activations& x, int64_t first,
                 int tokens, float* sums) {
  std::vector<float> dense(W::kRows * w.k, 0.0f);
  const uint16_t* values = w.values + shard * w.shards.capacity;
  const Status status = w.Walk(shard, band, [&](int row, int64_t col, int64_t at) {
    if (col < w.k)
      dense[row * w.k + col] = w.bf16 ? BF16ToFloat(values[at]) : F16ToFloat(values[at]);
  });
  for (int t = 0; t < tokens; ++t)
    for (int r = 0; r < W::kRows; ++r) {
      float sum = 0;
      for (int64_t c = 0; c < w.k; ++c) sum += dense[r * w.k + c] * x.Get((first + t) * x.k + c);
      sums[t * W::kRows + r] = sum;
    }
  return status;
}

int64_t Workers(ffi::ThreadPool& pool, int64_t work) {
  return work < kSerialWork ? 1 : pool.num_threads();
}

const char kOutOfRangeMessage[] =
    "an offset, mask or index points outside the values; the weight was not made by encode: "
    "call w.validate()";

ffi::Error RunBitmap(ffi::ThreadPool& pool, const BitmapWeight& w, const Activations& x,
                     const Output& y) {
  const Kernels& kernels = Active();
  const auto& d = w.dims;
  const bool skips_zeros = &kernels == &kPortableKernels;
  std::atomic<bool> out_of_range{false};
  for (int64_t first = 0; first < x.tokens; first += kMaxTokens) {
    const int tokens = static_cast<int>(std::min<int64_t>(kMaxTokens, x.tokens - first));
    const size_t packed_size = static_cast<size_t>(d.tiles) * bitmap::kSteps * tokens * 32;
    const int64_t work = w.shards.count * w.shards.rows * w.k * (1 + tokens / 4);
    XFlags flags;

    const float* packed = nullptr;
    auto pack_float = [&] {
      float* out = Scratch<float>(packed_size);
      ParallelFor(pool, Workers(pool, x.k * tokens), d.tiles, [&](int64_t tile) {
        PackTile(x, first, tokens, tile, out + tile * bitmap::kSteps * tokens * 32, flags,
                 [](float v) { return v; });
      });
      packed = out;
    };

    const uint16_t* packed_bf16 = nullptr;
    if (w.bf16 && x.type == DataType::BF16 && kernels.bitmap_bf16_dot && HasBf16Dot()) {
      uint16_t* out = Scratch<uint16_t>(packed_size);
      ParallelFor(pool, Workers(pool, x.k * tokens), d.tiles, [&](int64_t tile) {
        PackTile(x, first, tokens, tile, out + tile * bitmap::kSteps * tokens * 32, flags,
                 [](float v) { return static_cast<uint16_t>(FloatToBits(v) >> 16); });
      });
      if (!flags.subnormal) packed_bf16 = out;
    }
    if (!packed_bf16) pack_float();

    // Bands that the bf16 dot cannot do, for a second pass in fp32.
    std::vector<uint8_t> again(packed_bf16 ? w.shards.count * d.bands : 0);
    auto run_band = [&](int64_t index, bool dot) {
      const int64_t shard = index / d.bands, band = index % d.bands;
      BitmapBand b;
      b.masks = w.masks + shard * d.masks() + band * d.tiles * bitmap::kLanes;
      b.offsets = w.offsets + shard * d.offsets() + band * d.blocks;
      b.values = w.values + shard * w.shards.capacity;
      b.capacity = w.shards.capacity;
      b.tiles = d.tiles;
      b.tokens = tokens;
      b.x = dot ? static_cast<const void*>(packed_bf16) : packed;
      const BitmapFn f = dot      ? kernels.bitmap_bf16_dot
                         : w.bf16 ? kernels.bitmap_bf16
                                  : kernels.bitmap_f16;
      float sums[kMaxTokens * bitmap::kBandRows];
      const Status status = skips_zeros && flags.non_finite
                                ? DenseBand(w, shard, band, x, first, tokens, sums)
                                : f(b, sums);
      if (status == Status::kOutOfRange) {
        out_of_range = true;
        return;
      }
      if (status == Status::kSubnormal) {
        again[index] = 1;
        return;
      }
      const int64_t row = band * bitmap::kBandRows;
      const int64_t rows = std::min<int64_t>(bitmap::kBandRows, w.shards.rows - row);
      for (int t = 0; t < tokens; ++t)
        y.Store(first + t, shard * w.shards.rows + row, sums + t * bitmap::kBandRows, rows);
    };
    const int64_t bands = w.shards.count * d.bands;
    ParallelFor(pool, Workers(pool, work), bands,
                [&](int64_t index) { run_band(index, packed_bf16 != nullptr); });
    if (std::find(again.begin(), again.end(), 1) != again.end()) {
      pack_float();
      ParallelFor(pool, Workers(pool, work), bands, [&](int64_t index) {
        if (again[index]) run_band(index, false);
      });
    }
    if (out_of_range) return Bad(kOutOfRangeMessage);
  }
  return ffi::Error::Success();
}

// Columns of W that a thread expands at a time: 64 rows of them stay in its L2 cache.
constexpr int64_t kSlabBlocks = 16;
constexpr int64_t kSlabTiles = kSlabBlocks * tiled_csl::kBlockCols / bitmap::kTileCols;

// Blocks of Tiled-CSL expanded to four bands of a bitmap without zeros, which the bitmap's
// kernels multiply. The two orders of halves differ in one swap: registers 1 and 2 of a lane.
struct Slab {
  static constexpr int kBands = tiled_csl::kBlockRows / bitmap::kBandRows;
  static constexpr int64_t kBandValues = kSlabTiles * bitmap::kBandRows * bitmap::kTileCols;
  static constexpr int64_t kReadAhead = bitmap::kBlockWeights + 32;  // of BlockValues

  uint16_t values[kBands * kBandValues + kReadAhead];

  Status Expand(const TiledCslWeight& w, int64_t shard, int64_t band, int64_t first, int64_t end) {
    using namespace tiled_csl;
    constexpr unsigned kPartRows = tiled_csl::kRows / kBands;  // 16 rows of W, two tiles
    constexpr int64_t kPart = kPartRows * kLists;
    for (int i = 0; i < kBands; ++i)
      std::memset(values + i * kBandValues, 0, (end - first) * kPart * sizeof *values);
    const uint16_t* from = w.values + shard * w.shards.capacity;
    for (int64_t block = first; block < end; ++block) {
      TiledCslWeight::Block b;
      if (!w.Locate(shard, band, block, &b)) return Status::kOutOfRange;
      uint16_t* to = values + (block - first) * kPart;
      const Status status =
          TiledCslWeight::WalkBlock(b, [&](unsigned row, unsigned list, int64_t at) {
            const unsigned in_order = (list & ~6u) | (list & 2) << 1 | (list & 4) >> 1;
            to[row / kPartRows * kBandValues + row % kPartRows * kLists + in_order] = from[at];
          });
      if (status != Status::kOk) return status;
    }
    return Status::kOk;
  }

  // sums[token][64 rows] += the product with x, packed from the slab's first tile on.
  Status Multiply(BitmapFn f, const float* x, int tokens, int64_t tiles, float* sums) const {
    static const struct Full {
      uint32_t masks[kSlabTiles * bitmap::kLanes];
      uint32_t offsets[kSlabTiles / bitmap::kBlockTiles + 1];
      Full() {
        std::fill(std::begin(masks), std::end(masks), ~0u);
        for (uint32_t i = 0; i < std::size(offsets); ++i)
          offsets[i] = i * (bitmap::kBlockWeights / bitmap::kVector);
      }
    } full;
    for (int i = 0; i < kBands; ++i) {
      const BitmapBand b = {
          full.masks, full.offsets, values + i * kBandValues, kBandValues + kReadAhead, tiles,
          x,          tokens};
      float part[kMaxTokens * bitmap::kBandRows];
      if (const Status status = f(b, part); status != Status::kOk) return status;
      for (int t = 0; t < tokens; ++t)
        for (int r = 0; r < bitmap::kBandRows; ++r)
          sums[t * tiled_csl::kBlockRows + i * bitmap::kBandRows + r] +=
              part[t * bitmap::kBandRows + r];
    }
    return Status::kOk;
  }
};

ffi::Error RunTiledCsl(ffi::ThreadPool& pool, const TiledCslWeight& w, const Activations& x,
                       const Output& y) {
  const BitmapFn f = w.bf16 ? Active().bitmap_bf16 : Active().bitmap_f16;
  const auto& d = w.dims;
  const int64_t tiles = bitmap::Dims(w.shards.rows, w.k).tiles;
  std::atomic<bool> out_of_range{false};
  for (int64_t first = 0; first < x.tokens; first += kMaxTokens) {
    const int tokens = static_cast<int>(std::min<int64_t>(kMaxTokens, x.tokens - first));
    const int64_t work = w.shards.count * w.shards.rows * w.k * (1 + tokens / 4);
    const int64_t packed_tile = bitmap::kSteps * tokens * 32;
    float* packed = Scratch<float>(tiles * packed_tile);
    XFlags flags;
    ParallelFor(pool, Workers(pool, x.k * tokens), tiles, [&](int64_t tile) {
      PackTile(x, first, tokens, tile, packed + tile * packed_tile, flags,
               [](float v) { return v; });
    });
    ParallelFor(pool, Workers(pool, work), w.shards.count * d.bands, [&](int64_t index) {
      const int64_t shard = index / d.bands, band = index % d.bands;
      Slab& slab = *Scratch<Slab>(1);
      float sums[kMaxTokens * tiled_csl::kBlockRows] = {};
      for (int64_t block = 0; block < d.blocks; block += kSlabBlocks) {
        const int64_t tile = block * tiled_csl::kBlockCols / bitmap::kTileCols;
        Status status = slab.Expand(w, shard, band, block, std::min(block + kSlabBlocks, d.blocks));
        if (status == Status::kOk)
          status = slab.Multiply(f, packed + tile * packed_tile, tokens,
                                 std::min(kSlabTiles, tiles - tile), sums);
        if (status != Status::kOk) {
          out_of_range = true;
          return;
        }
      }
      const int64_t row = band * tiled_csl::kBlockRows;
      const int64_t rows = std::min<int64_t>(tiled_csl::kBlockRows, w.shards.rows - row);
      for (int t = 0; t < tokens; ++t)
        y.Store(first + t, shard * w.shards.rows + row, sums + t * tiled_csl::kBlockRows, rows);
    });
    if (out_of_range) return Bad(kOutOfRangeMessage);
  }
  return ffi::Error::Success();
}

// ---- decode and sample ----

// W to dense [S * R, K], every element written.
template <typename W>
ffi::Error RunDecode(ffi::ThreadPool& pool, const W& w, uint16_t* out) {
  std::atomic<bool> out_of_range{false};
  ParallelFor(pool, Workers(pool, w.shards.count * w.shards.rows * w.k),
              w.shards.count * w.dims.bands, [&](int64_t index) {
                const int64_t shard = index / w.dims.bands, band = index % w.dims.bands;
                const int64_t rows = std::min<int64_t>(W::kRows, w.shards.rows - band * W::kRows);
                uint16_t* base = out + (shard * w.shards.rows + band * W::kRows) * w.k;
                std::memset(base, 0, rows * w.k * sizeof(uint16_t));
                const uint16_t* values = w.values + shard * w.shards.capacity;
                const Status status = w.Walk(shard, band, [&](int row, int64_t col, int64_t at) {
                  if (row < rows && col < w.k) base[row * w.k + col] = values[at];
                });
                if (status != Status::kOk) out_of_range = true;
              });
  return out_of_range ? Bad(kOutOfRangeMessage) : ffi::Error::Success();
}

// Dense [S * R, K] at the stored positions, to [S, capacity]; zero where nothing is stored.
template <typename W>
ffi::Error RunSample(ffi::ThreadPool& pool, const W& w, const uint16_t* dense, uint16_t* out) {
  std::memset(out, 0, w.shards.count * w.shards.capacity * sizeof(uint16_t));
  std::atomic<bool> out_of_range{false};
  ParallelFor(pool, Workers(pool, w.shards.count * w.shards.rows * w.k),
              w.shards.count * w.dims.bands, [&](int64_t index) {
                const int64_t shard = index / w.dims.bands, band = index % w.dims.bands;
                const int64_t rows = std::min<int64_t>(W::kRows, w.shards.rows - band * W::kRows);
                const uint16_t* base = dense + (shard * w.shards.rows + band * W::kRows) * w.k;
                uint16_t* values = out + shard * w.shards.capacity;
                const Status status = w.Walk(shard, band, [&](int row, int64_t col, int64_t at) {
                  if (row < rows && col < w.k) values[at] = base[row * w.k + col];
                });
                if (status != Status::kOk) out_of_range = true;
              });
  return out_of_range ? Bad(kOutOfRangeMessage) : ffi::Error::Success();
}

// ---- handlers ----

template <typename V>
ffi::ErrorOr<BitmapWeight> MakeBitmap(const Words& masks, const Words& offsets, const V& values,
                                      int64_t m, int64_t k) {
  auto shards = CheckValues(values, m, k);
  if (shards.has_error()) return ffi::Unexpected(shards.error());
  const auto error = CheckBitmap(*shards, k, masks.element_count(), offsets.element_count());
  if (error.failure()) return ffi::Unexpected(error);
  return BitmapWeight{{*shards, k, values.element_type() == DataType::BF16,
                       static_cast<const uint16_t*>(values.untyped_data())},
                      masks.typed_data(),
                      offsets.typed_data(),
                      bitmap::Dims(shards->rows, k)};
}

template <typename V>
ffi::ErrorOr<TiledCslWeight> MakeTiledCsl(const Words& index, const Words& offsets, const V& values,
                                          int64_t m, int64_t k) {
  auto shards = CheckValues(values, m, k);
  if (shards.has_error()) return ffi::Unexpected(shards.error());
  const auto error = CheckTiledCsl(*shards, k, index.element_count(), offsets.element_count());
  if (error.failure()) return ffi::Unexpected(error);
  return TiledCslWeight{{*shards, k, values.element_type() == DataType::BF16,
                         static_cast<const uint16_t*>(values.untyped_data())},
                        index.typed_data(),
                        static_cast<int64_t>(index.element_count()) / shards->count,
                        offsets.typed_data(),
                        tiled_csl::Dims(shards->rows, k)};
}

ffi::Error CheckOperands(const Shards& s, int64_t k, const AnyBuffer& x, const AnyBuffer& bias,
                         const AnyBuffer& y) {
  const int64_t rows = s.count * s.rows;
  const int64_t x_size = static_cast<int64_t>(x.element_count());
  const auto is_float = [](DataType t) { return IsHalf(t) || t == DataType::F32; };
  if (!is_float(x.element_type()) || y.element_type() != x.element_type())
    return Bad("x and y must both be float16, bfloat16 or float32");
  if (x_size % k || static_cast<int64_t>(y.element_count()) != x_size / k * rows)
    return Bad("x or y does not fit the weight's shape");
  if (bias.element_count() &&
      (static_cast<int64_t>(bias.element_count()) != rows || !is_float(bias.element_type())))
    return Bad("bias does not fit the weight's rows");
  return ffi::Error::Success();
}

Activations MakeX(const AnyBuffer& x, int64_t k) {
  return {x.untyped_data(), x.element_type(), static_cast<int64_t>(x.element_count()) / k, k};
}

Output MakeY(const Shards& s, AnyBuffer& y, const AnyBuffer& bias, int64_t activation) {
  return {y.untyped_data(),    y.element_type(),
          s.count * s.rows,    bias.element_count() ? bias.untyped_data() : nullptr,
          bias.element_type(), activation};
}

ffi::Error SpmmBitmap(ffi::ThreadPool pool, Words masks, Words offsets, AnyBuffer values,
                      AnyBuffer x, AnyBuffer bias, ffi::Result<AnyBuffer> y, int64_t m, int64_t k,
                      int64_t activation) {
  auto w = MakeBitmap(masks, offsets, values, m, k);
  if (w.has_error()) return w.error();
  if (auto e = CheckOperands(w->shards, k, x, bias, *y); e.failure()) return e;
  return RunBitmap(pool, *w, MakeX(x, k), MakeY(w->shards, *y, bias, activation));
}

ffi::Error SpmmTiledCsl(ffi::ThreadPool pool, Words index, Words offsets, AnyBuffer values,
                        AnyBuffer x, AnyBuffer bias, ffi::Result<AnyBuffer> y, int64_t m, int64_t k,
                        int64_t activation) {
  auto w = MakeTiledCsl(index, offsets, values, m, k);
  if (w.has_error()) return w.error();
  if (auto e = CheckOperands(w->shards, k, x, bias, *y); e.failure()) return e;
  return RunTiledCsl(pool, *w, MakeX(x, k), MakeY(w->shards, *y, bias, activation));
}

template <typename W>
ffi::Error Decode(ffi::ThreadPool& pool, const W& w, AnyBuffer& out) {
  if (!IsHalf(out.element_type()) ||
      static_cast<int64_t>(out.element_count()) != w.shards.count * w.shards.rows * w.k)
    return Bad("decode: the output does not fit the weight's shape");
  return RunDecode(pool, w, static_cast<uint16_t*>(out.untyped_data()));
}

ffi::Error DecodeBitmap(ffi::ThreadPool pool, Words masks, Words offsets, AnyBuffer values,
                        ffi::Result<AnyBuffer> out, int64_t m, int64_t k) {
  auto w = MakeBitmap(masks, offsets, values, m, k);
  return w.has_error() ? w.error() : Decode(pool, *w, *out);
}

ffi::Error DecodeTiledCsl(ffi::ThreadPool pool, Words index, Words offsets, AnyBuffer values,
                          ffi::Result<AnyBuffer> out, int64_t m, int64_t k) {
  auto w = MakeTiledCsl(index, offsets, values, m, k);
  return w.has_error() ? w.error() : Decode(pool, *w, *out);
}

template <typename W>
ffi::Error Sample(ffi::ThreadPool& pool, const W& w, const AnyBuffer& dense, AnyBuffer& out) {
  if (!IsHalf(dense.element_type()) ||
      static_cast<int64_t>(dense.element_count()) != w.shards.count * w.shards.rows * w.k)
    return Bad("sample: the dense matrix does not fit the weight's shape");
  return RunSample(pool, w, static_cast<const uint16_t*>(dense.untyped_data()),
                   static_cast<uint16_t*>(out.untyped_data()));
}

ffi::Error SampleBitmap(ffi::ThreadPool pool, Words masks, Words offsets, AnyBuffer dense,
                        ffi::Result<AnyBuffer> out, int64_t m, int64_t k) {
  auto w = MakeBitmap(masks, offsets, *out, m, k);
  return w.has_error() ? w.error() : Sample(pool, *w, dense, *out);
}

ffi::Error SampleTiledCsl(ffi::ThreadPool pool, Words index, Words offsets, AnyBuffer dense,
                          ffi::Result<AnyBuffer> out, int64_t m, int64_t k) {
  auto w = MakeTiledCsl(index, offsets, *out, m, k);
  return w.has_error() ? w.error() : Sample(pool, *w, dense, *out);
}

}  // namespace

const char* ActiveKernels() { return Active().name; }

bool SelectKernels(const std::string& name) {
  const Kernels* best = Best();
#ifdef FLASHLLM_X86
  // Every AVX-512 VBMI2 machine has AVX2 too, so a weaker set than the best always runs.
  for (const Kernels* k : {&kPortableKernels, &kAvx2Kernels, &kAvx512Kernels}) {
#else
  for (const Kernels* k : {&kPortableKernels}) {
#endif
    if (name == k->name) {
      g_kernels.store(k);
      return true;
    }
    if (k == best) break;
  }
  return false;
}

static auto BindSpmm() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Words>()
      .Arg<Words>()
      .Arg<AnyBuffer>()
      .Arg<AnyBuffer>()
      .Arg<AnyBuffer>()
      .Ret<AnyBuffer>()
      .Attr<int64_t>("m")
      .Attr<int64_t>("k")
      .Attr<int64_t>("activation");
}

static auto BindUnary() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Words>()
      .Arg<Words>()
      .Arg<AnyBuffer>()
      .Ret<AnyBuffer>()
      .Attr<int64_t>("m")
      .Attr<int64_t>("k");
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(kSpmmBitmapCpu, SpmmBitmap, BindSpmm());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kSpmmTiledCslCpu, SpmmTiledCsl, BindSpmm());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kDecodeBitmapCpu, DecodeBitmap, BindUnary());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kDecodeTiledCslCpu, DecodeTiledCsl, BindUnary());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kSampleBitmapCpu, SampleBitmap, BindUnary());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kSampleTiledCslCpu, SampleTiledCsl, BindUnary());

}  // namespace flashllm
