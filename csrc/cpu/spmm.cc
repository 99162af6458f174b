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

  int64_t bands() const { return dims.bands; }

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

struct DeltaCsrWeight : Weight {
  static constexpr int kRows = 1;
  const uint32_t* index;
  int64_t index_capacity;
  const uint32_t* offsets;
  delta_csr::Dims dims;

  int64_t bands() const { return dims.rows; }

  // What `item` of a shard is, but for x; false if the offsets point outside the buffers.
  bool Locate(int64_t shard, int64_t item, DeltaCsrItem* out) const {
    using namespace delta_csr;
    const uint32_t* o = offsets + shard * dims.offsets();
    const int64_t first = o[item], end = o[item + 1];
    const int bits = o[dims.items + 1] == 4 ? 4 : 8;
    if (o[dims.items + 1] != static_cast<uint32_t>(bits) || first > end ||
        end - first > Groups(dims.block_cols) || end * kGroupValues > shards.capacity ||
        IndexStart(item + 1, end, bits) > index_capacity)
      return false;
    *out = {index + shard * index_capacity + IndexStart(item, first, bits),
            values + shard * shards.capacity + first * kGroupValues,
            end - first,
            bits,
            nullptr,
            static_cast<uint32_t>(dims.block_cols),
            0};
    return true;
  }

  // As a bitmap's, of a row: f(0, col, index into the shard's values).
  template <typename F>
  Status Walk(int64_t shard, int64_t row, F f) const {
    using namespace delta_csr;
    for (int64_t block = 0; block < dims.blocks; ++block) {
      DeltaCsrItem item;
      if (!Locate(shard, block * dims.rows + row, &item)) return Status::kOutOfRange;
      uint16_t bases[kLanes];
      std::memcpy(bases, item.index, sizeof bases);
      uint32_t cols[kLanes];
      bool fillers[kLanes] = {};  // whether the entry before is one
      for (int lane = 0; lane < kLanes; ++lane) cols[lane] = bases[lane] - 1u;
      const auto* codes = reinterpret_cast<const uint8_t*>(item.index + kBaseWords);
      int64_t at = item.values - values - shard * shards.capacity;
      for (int64_t group = 0; group < item.groups; ++group)
        for (int lane = 0; lane < kLanes; ++lane)
          for (int i = 0; i < kSteps; ++i, ++at) {
            const int64_t entry = (group * kLanes + lane) * kSteps + i;
            const int code = item.bits == 8 ? static_cast<int8_t>(codes[entry])
                                            : codes[entry / 2] >> (4 * (i % 2)) & 15;
            const bool filler = code == Filler(item.bits);
            cols[lane] += static_cast<uint32_t>(code);
            if (cols[lane] + 1 > item.columns) return Status::kOutOfRange;
            if (code ? !filler : fillers[lane]) f(0, block * dims.block_cols + cols[lane], at);
            fillers[lane] = filler;
          }
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

// Columns of x, one after the other, in floats: [columns][width], zeros behind the tokens.
void Transpose(const Activations& x, int64_t first, int tokens, int width, int64_t col,
               int64_t columns, float* out, XFlags& flags) {
  constexpr int kStrip = 64;
  float strip[kStrip];
  uint32_t any_inf = 0;
  for (int64_t c = 0; c < columns; c += kStrip)
    for (int t = 0; t < width; ++t) {
      const auto n = static_cast<int>(std::min<int64_t>(kStrip, columns - c));
      if (t < tokens)
        LoadColumns(x, first + t, col + c, n, strip);
      else
        std::fill(strip, strip + n, 0.0f);
      for (int j = 0; j < n; ++j) {
        any_inf |= (FloatToBits(strip[j]) & 0x7fffffff) >= 0x7f800000;
        out[(c + j) * width + t] = strip[j];
      }
    }
  if (any_inf) flags.non_finite = true;
}

ffi::Error RunDeltaCsr(ffi::ThreadPool& pool, const DeltaCsrWeight& w, const Activations& x,
                       const Output& y) {
  const DeltaCsrFn f = w.bf16 ? Active().delta_csr_bf16 : Active().delta_csr_f16;
  const auto& d = w.dims;
  std::atomic<bool> out_of_range{false};
  for (int64_t first = 0; first < x.tokens; first += kMaxTokens) {
    const int tokens = static_cast<int>(std::min<int64_t>(kMaxTokens, x.tokens - first));
    const int width = ItemTokens(tokens);
    const int64_t work = w.shards.count * w.shards.rows * w.k * (1 + tokens / 4);
    const int64_t block_size = (1 + d.block_cols) * width;
    float* packed = Scratch<float>(d.blocks * block_size);
    XFlags flags;
    constexpr int64_t kColumns = 256;
    const int64_t parts = bitmap::CeilDiv(d.block_cols, kColumns);
    ParallelFor(pool, Workers(pool, x.k * tokens), d.blocks * parts, [&](int64_t i) {
      const int64_t block = i / parts, col = i % parts * kColumns;
      float* to = packed + block * block_size;
      if (col == 0) std::fill(to, to + width, 0.0f);
      Transpose(x, first, tokens, width, block * d.block_cols + col,
                std::min(kColumns, d.block_cols - col), to + (1 + col) * width, flags);
    });
    ParallelFor(pool, Workers(pool, work), w.shards.count * d.rows, [&](int64_t index) {
      const int64_t shard = index / d.rows, row = index % d.rows;
      float sums[kMaxTokens] = {};
      Status status = Status::kOk;
      if (flags.non_finite) {
        status = DenseBand(w, shard, row, x, first, tokens, sums);
      } else {
        for (int64_t b = 0; b < d.blocks && status == Status::kOk; ++b) {
          DeltaCsrItem item;
          float part[kMaxTokens];
          status = Status::kOutOfRange;
          if (!w.Locate(shard, b * d.rows + row, &item)) break;
          item.x = packed + b * block_size;
          item.tokens = width;
          status = f(item, part);
          for (int t = 0; t < tokens; ++t) sums[t] += part[t];
        }
      }
      if (status != Status::kOk) {
        out_of_range = true;
        return;
      }
      for (int t = 0; t < tokens; ++t) y.Store(first + t, shard * w.shards.rows + row, sums + t, 1);
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
  ParallelFor(pool, Workers(pool, w.shards.count * w.shards.rows * w.k), w.shards.count * w.bands(),
              [&](int64_t index) {
                const int64_t shard = index / w.bands(), band = index % w.bands();
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
  ParallelFor(pool, Workers(pool, w.shards.count * w.shards.rows * w.k), w.shards.count * w.bands(),
              [&](int64_t index) {
                const int64_t shard = index / w.bands(), band = index % w.bands();
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
ffi::ErrorOr<DeltaCsrWeight> MakeDeltaCsr(const Words& index, const Words& offsets, const V& values,
                                          int64_t m, int64_t k) {
  auto shards = CheckValues(values, m, k);
  if (shards.has_error()) return ffi::Unexpected(shards.error());
  const auto error = CheckDeltaCsr(*shards, k, index.element_count(), offsets.element_count());
  if (error.failure()) return ffi::Unexpected(error);
  return DeltaCsrWeight{{*shards, k, values.element_type() == DataType::BF16,
                         static_cast<const uint16_t*>(values.untyped_data())},
                        index.typed_data(),
                        static_cast<int64_t>(index.element_count()) / shards->count,
                        offsets.typed_data(),
                        delta_csr::Dims(shards->rows, k)};
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

ffi::Error SpmmDeltaCsr(ffi::ThreadPool pool, Words index, Words offsets, AnyBuffer values,
                        AnyBuffer x, AnyBuffer bias, ffi::Result<AnyBuffer> y, int64_t m, int64_t k,
                        int64_t activation) {
  auto w = MakeDeltaCsr(index, offsets, values, m, k);
  if (w.has_error()) return w.error();
  if (auto e = CheckOperands(w->shards, k, x, bias, *y); e.failure()) return e;
  return RunDeltaCsr(pool, *w, MakeX(x, k), MakeY(w->shards, *y, bias, activation));
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

ffi::Error DecodeDeltaCsr(ffi::ThreadPool pool, Words index, Words offsets, AnyBuffer values,
                          ffi::Result<AnyBuffer> out, int64_t m, int64_t k) {
  auto w = MakeDeltaCsr(index, offsets, values, m, k);
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

ffi::Error SampleDeltaCsr(ffi::ThreadPool pool, Words index, Words offsets, AnyBuffer dense,
                          ffi::Result<AnyBuffer> out, int64_t m, int64_t k) {
  auto w = MakeDeltaCsr(index, offsets, *out, m, k);
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
XLA_FFI_DEFINE_HANDLER_SYMBOL(kSpmmDeltaCsrCpu, SpmmDeltaCsr, BindSpmm());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kDecodeBitmapCpu, DecodeBitmap, BindUnary());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kDecodeDeltaCsrCpu, DecodeDeltaCsr, BindUnary());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kSampleBitmapCpu, SampleBitmap, BindUnary());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kSampleDeltaCsrCpu, SampleDeltaCsr, BindUnary());

}  // namespace flashllm
