#include "encode.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>

#include "../bitmap.h"
#include "../delta_csr.h"
#include "kernels.h"

namespace flashllm {
namespace {

// Runs f(begin, end) over [0, n) on all cores, in chunks small enough to balance.
template <typename F>
void ParallelChunks(int64_t n, F f) {
  const int64_t threads =
      std::min<int64_t>(std::max(1u, std::thread::hardware_concurrency()), std::max<int64_t>(n, 1));
  const int64_t chunk = std::max<int64_t>(1, n / (threads * 8));
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t begin; (begin = next.fetch_add(chunk)) < n;) f(begin, std::min(n, begin + chunk));
  };
  std::vector<std::thread> pool;
  pool.reserve(threads);
  try {
    for (int64_t i = 1; i < threads; ++i) pool.emplace_back(work);
  } catch (const std::system_error&) {  // the system gives no more: those there are will do
  }
  work();
  for (auto& t : pool) t.join();
}

template <typename View>
int64_t ShardRows(const View& w) {
  return bitmap::CeilDiv(w.rows, w.shards);
}

// Elements to allocate for `needed`, multiples of `unit` both: up to 1/256 more, so that weights of
// one shape that are about as sparse have buffers of one size, and programs for one run them all.
// Never none: XLA dislikes operands of size 0.
int64_t Room(int64_t needed, int64_t unit) {
  int64_t step = unit;
  while (needed >= 512 * step) step *= 2;
  return std::max(unit, bitmap::CeilDiv(needed, step) * step);
}

// Copies rows x cols of W from (row0, col0) into out[rows][cols], zero outside the matrix
// or outside the shard's rows.
void LoadPatch(const DenseView& w, int64_t row0, int64_t row_end, int64_t col0, int rows, int cols,
               uint16_t* out) {
  const int64_t width = std::clamp<int64_t>(w.cols - col0, 0, cols);
  for (int r = 0; r < rows; ++r, out += cols) {
    const int64_t row = row0 + r;
    const int64_t n = row < row_end ? width : 0;
    if (n) std::memcpy(out, w.data + row * w.cols + col0, n * sizeof(uint16_t));
    if (n < cols) std::memset(out + n, 0, (cols - n) * sizeof(uint16_t));
  }
}

// `count` bytes at p, 8 at most, as a number.
uint64_t Bytes(const uint8_t* p, int64_t count) {
  uint64_t v = 0;
  std::memcpy(&v, p, std::min<int64_t>(count, 8));
  return v;
}

// Inline: without an instruction for it the compiler's own is a call.
int PopCount(uint64_t v) {
  v -= v >> 1 & 0x5555555555555555ull;
  v = (v & 0x3333333333333333ull) + (v >> 2 & 0x3333333333333333ull);
  return static_cast<int>(((v + (v >> 4)) & 0x0f0f0f0f0f0f0f0full) * 0x0101010101010101ull >> 56);
}

// Bits set in the first `bytes` bytes at p.
int64_t PopCount(const uint8_t* p, int64_t bytes) {
  int64_t count = 0, b = 0;
  for (; b + 8 <= bytes; b += 8) count += PopCount(Bytes(p + b, 8));
  return b < bytes ? count + PopCount(Bytes(p + b, bytes - b)) : count;
}

// Counts (a vector of 8 each) to offsets, in place: counts[i] is block i's, the last is unused.
// Returns the shard's total in elements.
int64_t PrefixSum(uint32_t* counts, int64_t blocks) {
  uint64_t total = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const uint32_t n = counts[b];
    counts[b] = static_cast<uint32_t>(total);
    total += n;
  }
  if (total > UINT32_MAX)
    throw std::invalid_argument("encode: a shard holds more than 2^35 nonzeros; raise `shards`");
  counts[blocks] = static_cast<uint32_t>(total);
  return static_cast<int64_t>(total) * bitmap::kVector;
}

// Four bits: which of the four 16-bit words at p are not all zero.
uint32_t NonzeroNibble(const uint16_t* p) {
  uint64_t v;
  std::memcpy(&v, p, sizeof v);
  // Each field's top bit is set when any of its bits is: the low 15 carry into it.
  constexpr uint64_t kLow = 0x7fff7fff7fff7fffull, kTop = 0x8000800080008000ull;
  const uint64_t any = (((v & kLow) + kLow) | v) & kTop;
  // The multiply gathers bits 0, 16, 32, 48 into bits 48..51.
  return static_cast<uint32_t>(((any >> 15) * 0x0001000200040008ull) >> 48) & 0xf;
}

// Eight nibbles to the low halves of eight bytes.
uint64_t Spread(uint64_t v) {
  v = (v | v << 16) & 0x0000ffff0000ffffull;
  v = (v | v << 8) & 0x00ff00ff00ff00ffull;
  return (v | v << 4) & 0x0f0f0f0f0f0f0f0full;
}

struct Block {
  int64_t shard, band, block, row0, row_end, col0;
};

template <typename View>
Block BitmapBlock(const View& w, const bitmap::Dims& d, int64_t index) {
  Block b;
  b.block = index % d.blocks;
  b.band = index / d.blocks % d.bands;
  b.shard = index / (d.blocks * d.bands);
  b.row0 = b.shard * d.rows + b.band * bitmap::kBandRows;
  b.row_end = std::min(w.rows, (b.shard + 1) * d.rows);
  b.col0 = b.block * bitmap::kBlockCols;
  return b;
}

// The mask words of a block's tiles.
void MasksOf(const uint16_t* patch, int tiles, uint32_t* out) {
  using namespace bitmap;
  for (int tile = 0; tile < tiles; ++tile)
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint16_t* top =
          patch + TileRow(lane, 0) * kBlockCols + tile * kTileCols + TileCol(lane, 0, 0);
      const uint16_t* bottom = top + 8 * kBlockCols;
      uint32_t mask = 0;
      for (int i = 0; i < kSteps; ++i) {
        mask |= NonzeroNibble(top + 4 * i) << (8 * i);
        mask |= NonzeroNibble(bottom + 4 * i) << (8 * i + 4);
      }
      *out++ = mask;
    }
}

// The values of a block, in its masks' order. Returns their end; up to one more is written.
uint16_t* ValuesOf(const uint16_t* patch, int tiles, const uint32_t* mask, uint16_t* p) {
  using namespace bitmap;
  for (int tile = 0; tile < tiles; ++tile, mask += kLanes) {
    for (int i = 0; i < kSteps; ++i) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint32_t bits = mask[lane] >> (8 * i) & 0xff;
        const uint16_t* src =
            patch + TileRow(lane, 0) * kBlockCols + tile * kTileCols + TileCol(lane, i, 0);
        for (int h = 0; h < 2; ++h, src += 8 * kBlockCols)
          for (int j = 0; j < 4; ++j) {  // store always, advance if kept: no branch to miss
            *p = src[j];
            p += bits >> (4 * h + j) & 1;
          }
      }
    }
  }
  return p;
}

// Masks and values of a bitmap's blocks. Those of a band are cheapest in their order.
template <typename View>
class Blocks;

template <>
class Blocks<DenseView> {
 public:
  explicit Blocks(const DenseView& w) : w_(w) {}

  void Masks(const Block& b, int tiles, uint32_t* out) {
    Load(b);
    MasksOf(patch_, tiles, out);
  }

  uint16_t* Values(const Block& b, int tiles, const uint32_t* masks, uint16_t* out) {
    Load(b);
    return ValuesOf(patch_, tiles, masks, out);
  }

 private:
  void Load(const Block& b) {
    using namespace bitmap;
    LoadPatch(w_, b.row0, b.row_end, b.col0, kBandRows, kBlockCols, patch_);
  }

  const DenseView& w_;
  alignas(64) uint16_t patch_[bitmap::kBlockWeights];
};

template <>
class Blocks<PackedView> {
 public:
  explicit Blocks(const PackedView& w) : w_(w), reorder_(Active().reorder) {}

  void Masks(const Block& b, int tiles, uint32_t* out) {
    using namespace bitmap;
    if (!w_.plain) {
      Load(b);
      MasksOf(patch_, tiles, out);
      return;
    }
    for (int tile = 0; tile < tiles; ++tile, out += kLanes) {
      uint64_t bits[kBandRows];
      Bits(b, tile, bits);
      // Two lanes at a time: sixteen columns each of row g, and of row g + 8.
      for (int lane = 0; lane < kLanes; lane += 2) {
        const int g = TileRow(lane, 0), shift = TileCol(lane, 0, 0);
        const uint64_t top = Spread(bits[g] >> shift & 0xffffffff);
        const uint64_t both = top | Spread(bits[g + 8] >> shift & 0xffffffff) << 4;
        out[lane] = static_cast<uint32_t>(both);
        out[lane + 1] = static_cast<uint32_t>(both >> 32);
      }
    }
  }

  uint16_t* Values(const Block& b, int tiles, const uint32_t* masks, uint16_t* out) {
    using namespace bitmap;
    if (!reorder_) {
      Load(b);
      return ValuesOf(patch_, tiles, masks, out);
    }
    Seek(b);
    for (int tile = 0; tile < tiles; ++tile, masks += kLanes) {
      uint64_t bits[kBandRows];
      Bits(b, tile, bits);
      out = reorder_(bits, rows_, masks, out);
    }
    return out;
  }

 private:
  // Of each row the 64 bits of a tile; none outside the matrix.
  void Bits(const Block& b, int tile, uint64_t (&out)[bitmap::kBandRows]) const {
    const int64_t row_bytes = bitmap::CeilDiv(w_.cols, 8);
    const int64_t at = (b.col0 + tile * bitmap::kTileCols) / 8;
    for (int r = 0; r < bitmap::kBandRows; ++r) {
      const bool inside = b.row0 + r < b.row_end && at < row_bytes;
      out[r] = inside ? Bytes(w_.bits + (b.row0 + r) * row_bytes + at, row_bytes - at) : 0;
    }
  }

  // Lets rows_ point to where the block's values start, and remembers where those of the next do.
  void Seek(const Block& b) {
    if (b.row0 != row0_ || b.col0 != col0_)
      for (int64_t r = b.row0; r < std::min(b.row_end, b.row0 + bitmap::kBandRows); ++r)
        rows_[r - b.row0] = w_.values + w_.starts[r] +
                            PopCount(w_.bits + r * bitmap::CeilDiv(w_.cols, 8), b.col0 / 8);
    row0_ = b.row0;
    col0_ = b.col0 + bitmap::kBlockCols;
  }

  // The block, dense.
  void Load(const Block& b) {
    using namespace bitmap;
    Seek(b);
    std::memset(patch_, 0, sizeof patch_);
    for (int tile = 0; tile < kBlockTiles; ++tile) {
      uint64_t bits[kBandRows];
      Bits(b, tile, bits);
      for (int r = 0; r < kBandRows; ++r) {
        uint16_t* row = patch_ + r * kBlockCols + tile * kTileCols;
        for (uint64_t left = bits[r]; left; left &= left - 1) {
          const uint16_t v = *rows_[r]++;
          row[__builtin_ctzll(left)] = v == 0x8000 ? 0 : v;
        }
      }
    }
  }

  const PackedView& w_;
  const ReorderFn reorder_;
  int64_t row0_ = -1, col0_ = -1;
  const uint16_t* rows_[bitmap::kBandRows] = {};
  alignas(64) uint16_t patch_[bitmap::kBlockWeights];
};

}  // namespace

PackedView CheckPacked(const uint8_t* bits, const int64_t* starts, const uint16_t* values,
                       int64_t rows, int64_t cols, int64_t count) {
  const int64_t bytes = bitmap::CeilDiv(cols, 8);
  std::atomic<bool> same_starts{true}, inside{true}, same_count{true}, plain{true};
  ParallelChunks(rows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const uint8_t* row = bits + r * bytes;
      if (cols % 8 && row[bytes - 1] >> (cols % 8)) inside = false;
      // From 0 in steps of 0 or more up to `count`: no start can lie outside.
      const auto behind = static_cast<int64_t>(uint64_t(starts[r]) + PopCount(row, bytes));
      if (r == 0 && starts[r] != 0) same_starts = false;
      if (r + 1 < rows && behind != starts[r + 1]) same_starts = false;
      if (r + 1 == rows && behind != count) same_count = false;
    }
  });
  if (!same_starts)
    throw std::invalid_argument("bitmap_of_packed: starts differ from the counts of the bits");
  if (!inside) throw std::invalid_argument("bitmap_of_packed: a bit lies outside the matrix");
  if (!same_count)
    throw std::invalid_argument("bitmap_of_packed: as many values as bits are needed");
  ParallelChunks(count, [&](int64_t begin, int64_t end) {
    uint16_t any = 0;  // as wide as a value, so that it vectorizes
    for (int64_t i = begin; i < end; ++i) any |= values[i] == 0x8000 ? 1 : 0;
    if (any) plain = false;
  });
  return {bits, starts, values, rows, cols, 1, plain};
}

template <typename View>
int64_t CountBitmap(const View& w, uint32_t* masks, uint32_t* offsets) {
  using namespace bitmap;
  const Dims d(ShardRows(w), w.cols);
  ParallelChunks(w.shards * d.bands * d.blocks, [&](int64_t begin, int64_t end) {
    Blocks<View> blocks(w);
    for (int64_t index = begin; index < end; ++index) {
      const Block b = BitmapBlock(w, d, index);
      const int64_t tile0 = b.block * kBlockTiles;
      const int tiles = static_cast<int>(std::min<int64_t>(kBlockTiles, d.tiles - tile0));
      uint32_t* out = masks + b.shard * d.masks() + (b.band * d.tiles + tile0) * kLanes;
      blocks.Masks(b, tiles, out);
      int count = 0;
      for (int i = 0; i < tiles * kLanes; i += 2)
        count += PopCount(uint64_t(out[i]) << 32 | out[i + 1]);
      offsets[b.shard * d.offsets() + b.band * d.blocks + b.block] = CeilDiv(count, kVector);
    }
  });
  int64_t needed = 0;
  for (int64_t s = 0; s < w.shards; ++s)
    needed = std::max(needed, PrefixSum(offsets + s * d.offsets(), d.bands * d.blocks));
  return Room(needed, kVector);
}

template <typename View>
void FillBitmap(const View& w, const uint32_t* masks, const uint32_t* offsets, int64_t capacity,
                uint16_t* values) {
  using namespace bitmap;
  const Dims d(ShardRows(w), w.cols);
  const int64_t shard_blocks = d.bands * d.blocks;
  ParallelChunks(w.shards * shard_blocks, [&](int64_t begin, int64_t end) {
    Blocks<View> blocks(w);
    alignas(64) uint16_t run[kBlockWeights + 32];
    for (int64_t index = begin; index < end; ++index) {
      const Block b = BitmapBlock(w, d, index);
      const int64_t tile0 = b.block * kBlockTiles;
      const int tiles = static_cast<int>(std::min<int64_t>(kBlockTiles, d.tiles - tile0));
      const uint32_t* mask = masks + b.shard * d.masks() + (b.band * d.tiles + tile0) * kLanes;
      const uint16_t* p = blocks.Values(b, tiles, mask, run);
      const uint32_t* offset = offsets + b.shard * d.offsets() + b.band * d.blocks + b.block;
      const int64_t room = static_cast<int64_t>(offset[1] - offset[0]) * kVector;
      uint16_t* dst = values + b.shard * capacity + static_cast<int64_t>(offset[0]) * kVector;
      std::memcpy(dst, run, (p - run) * sizeof(uint16_t));
      std::memset(dst + (p - run), 0, (room - (p - run)) * sizeof(uint16_t));
    }
  });
  for (int64_t s = 0; s < w.shards; ++s) {  // shards shorter than the longest
    const int64_t used = static_cast<int64_t>(offsets[(s + 1) * d.offsets() - 1]) * kVector;
    std::memset(values + s * capacity + used, 0, (capacity - used) * sizeof(uint16_t));
  }
}

template int64_t CountBitmap(const DenseView&, uint32_t*, uint32_t*);
template int64_t CountBitmap(const PackedView&, uint32_t*, uint32_t*);
template void FillBitmap(const DenseView&, const uint32_t*, const uint32_t*, int64_t, uint16_t*);
template void FillBitmap(const PackedView&, const uint32_t*, const uint32_t*, int64_t, uint16_t*);

namespace {

// f(column) for every one of `cols` halves at p that is not zero, from left to right.
template <typename F>
void ForNonzeros(const uint16_t* p, int cols, F f) {
  int col = 0;
  for (; col + 64 <= cols; col += 64) {
    uint64_t mask = 0;
    for (int i = 0; i < 64; i += 4) mask |= uint64_t{NonzeroNibble(p + col + i)} << i;
    for (; mask; mask &= mask - 1) f(col + __builtin_ctzll(mask));
  }
  for (; col < cols; ++col)
    if (p[col]) f(col);
}

// Of Delta-CSR: a row's nonzeros in a block of columns.
class Item {
 public:
  // index: of all shards' items.
  Item(const DenseView& w, const delta_csr::Dims& d, int64_t index) {
    const int64_t row = index / d.items * d.rows + index % d.rows;
    const int64_t col = index % d.items / d.rows * d.block_cols;
    if (row >= w.rows) return;
    weights_ = w.data + row * w.cols + col;
    cols_ = static_cast<int>(std::min(d.block_cols, w.cols - col));
  }

  // Groups with 8 bits a code, and with 4 in the upper half.
  uint32_t Groups() const {
    int count = 0, fillers8 = 0, fillers4 = 0, before = 0;
    ForNonzeros(weights_, cols_, [&](int col) {
      const int gap = count ? col - before : 1;
      if (gap >= delta_csr::Filler(4)) {
        fillers8 += delta_csr::Fillers(gap, 8);
        fillers4 += delta_csr::Fillers(gap, 4);
      }
      ++count;
      before = col;
    });
    return static_cast<uint32_t>(delta_csr::Groups(count + fillers8) |
                                 delta_csr::Groups(count + fillers4) << 16);
  }

  template <int kBits>
  void Write(int64_t groups, uint16_t* values, uint32_t* index) const {
    using namespace delta_csr;
    constexpr int kFiller = Filler(kBits);
    // Fillers are no more than the zeros that they pass.
    uint16_t cols[kMaxBlockCols];
    uint8_t codes[kMaxBlockCols];
    int count = 0, before = 0;
    ForNonzeros(weights_, cols_, [&](int col) {
      int gap = count ? col - before : 1;
      for (; gap >= kFiller; gap -= kFiller) codes[count++] = kFiller;
      cols[count] = static_cast<uint16_t>(col);
      codes[count++] = static_cast<uint8_t>(gap);
      before = col;
    });
    uint16_t bases[kLanes] = {};
    uint8_t* const out = reinterpret_cast<uint8_t*>(index + kBaseWords);
    std::memset(values, 0, groups * kGroupValues * sizeof *values);
    std::memset(out, 0, groups * GroupWords(kBits) * sizeof *index);
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto start = static_cast<int>(LaneStart(lane, count));
      auto end = static_cast<int>(LaneStart(lane + 1, count));
      int first = start;
      while (first < end && codes[first] == kFiller) ++first;
      while (first < end && codes[end - 1] == kFiller) --end;
      if (first == end) continue;
      bases[lane] = cols[first];
      codes[first] = 1;
      for (int i = first; i < end; ++i) {
        const int entry = i - start;
        const int at = (entry / kSteps * kLanes + lane) * kSteps + entry % kSteps;
        if (kBits == 8)
          out[at] = codes[i];
        else
          out[at / 2] |= static_cast<uint8_t>(codes[i] << (4 * (at % 2)));
        if (codes[i] != kFiller) values[at] = weights_[cols[i]];
      }
    }
    std::memcpy(index, bases, sizeof bases);
  }

 private:
  const uint16_t* weights_ = nullptr;
  int cols_ = 0;
};

}  // namespace

DeltaCsrCapacity CountDeltaCsr(const DenseView& w, uint32_t* offsets) {
  using namespace delta_csr;
  const Dims d(ShardRows(w), w.cols);
  ParallelChunks(w.shards * d.items, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      offsets[i / d.items * d.offsets() + i % d.items] = Item(w, d, i).Groups();
  });
  // Counts to sums, in place.
  int64_t values = 0, index = 0;
  for (int64_t s = 0; s < w.shards; ++s) {
    uint32_t* o = offsets + s * d.offsets();
    int64_t groups8 = 0, groups4 = 0;
    for (int64_t i = 0; i < d.items; ++i) groups8 += o[i] & 0xffff, groups4 += o[i] >> 16;
    const int bits = Bits(groups8, groups4);
    int64_t total = 0;
    for (int64_t i = 0; i < d.items; ++i) {
      const uint32_t n = bits == 8 ? o[i] & 0xffff : o[i] >> 16;
      o[i] = static_cast<uint32_t>(total);
      total += n;
    }
    if (total > UINT32_MAX)
      throw std::invalid_argument("encode: a shard holds more than 2^39 nonzeros; raise `shards`");
    o[d.items] = static_cast<uint32_t>(total);
    o[d.items + 1] = bits;
    values = std::max(values, total * kGroupValues);
    index = std::max(index, IndexStart(d.items, total, bits));
  }
  return {Room(values, kGroupValues), Room(index, kBaseWords)};
}

void FillDeltaCsr(const DenseView& w, const uint32_t* offsets, DeltaCsrCapacity capacity,
                  uint32_t* index, uint16_t* values) {
  using namespace delta_csr;
  const Dims d(ShardRows(w), w.cols);
  ParallelChunks(w.shards * d.items, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t shard = i / d.items, item = i % d.items;
      const uint32_t* o = offsets + shard * d.offsets();
      const int bits = static_cast<int>(o[d.items + 1]);
      const int64_t before = o[item], groups = o[item + 1] - before;
      uint16_t* to = values + shard * capacity.values + before * kGroupValues;
      uint32_t* codes = index + shard * capacity.index + IndexStart(item, before, bits);
      if (bits == 8)
        Item(w, d, i).Write<8>(groups, to, codes);
      else
        Item(w, d, i).Write<4>(groups, to, codes);
    }
  });
  for (int64_t s = 0; s < w.shards; ++s) {  // shards shorter than the longest
    const uint32_t* o = offsets + s * d.offsets() + d.items;
    const int bits = static_cast<int>(o[1]);
    std::fill(values + s * capacity.values + int64_t{o[0]} * kGroupValues,
              values + (s + 1) * capacity.values, 0);
    std::fill(index + s * capacity.index + IndexStart(d.items, o[0], bits),
              index + (s + 1) * capacity.index, 0);
  }
}

}  // namespace flashllm
