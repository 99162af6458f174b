#include "encode.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>

#include "../bitmap.h"
#include "../tiled_csl.h"

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
  for (int64_t i = 1; i < threads; ++i) pool.emplace_back(work);
  work();
  for (auto& t : pool) t.join();
}

int64_t ShardRows(const DenseView& w) { return bitmap::CeilDiv(w.rows, w.shards); }

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

struct Block {
  int64_t shard, band, block, row0, row_end, col0;
};

Block BitmapBlock(const DenseView& w, const bitmap::Dims& d, int64_t index) {
  Block b;
  b.block = index % d.blocks;
  b.band = index / d.blocks % d.bands;
  b.shard = index / (d.blocks * d.bands);
  b.row0 = b.shard * d.rows + b.band * bitmap::kBandRows;
  b.row_end = std::min(w.rows, (b.shard + 1) * d.rows);
  b.col0 = b.block * bitmap::kBlockCols;
  return b;
}

}  // namespace

int64_t CountBitmap(const DenseView& w, uint32_t* masks, uint32_t* offsets) {
  using namespace bitmap;
  const Dims d(ShardRows(w), w.cols);
  ParallelChunks(w.shards * d.bands * d.blocks, [&](int64_t begin, int64_t end) {
    alignas(64) uint16_t patch[kBandRows * kBlockCols];
    for (int64_t index = begin; index < end; ++index) {
      const Block b = BitmapBlock(w, d, index);
      LoadPatch(w, b.row0, b.row_end, b.col0, kBandRows, kBlockCols, patch);
      const int64_t tile0 = b.block * kBlockTiles;
      const int tiles = static_cast<int>(std::min<int64_t>(kBlockTiles, d.tiles - tile0));
      uint32_t* out = masks + b.shard * d.masks() + (b.band * d.tiles + tile0) * kLanes;
      uint32_t count = 0;
      for (int tile = 0; tile < tiles; ++tile) {
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
          count += __builtin_popcount(mask);
        }
      }
      offsets[b.shard * d.offsets() + b.band * d.blocks + b.block] = CeilDiv(count, kVector);
    }
  });
  int64_t capacity = kVector;  // never empty: XLA dislikes operands of size 0
  for (int64_t s = 0; s < w.shards; ++s)
    capacity = std::max(capacity, PrefixSum(offsets + s * d.offsets(), d.bands * d.blocks));
  return capacity;
}

void FillBitmap(const DenseView& w, const uint32_t* masks, const uint32_t* offsets,
                int64_t capacity, uint16_t* values) {
  using namespace bitmap;
  const Dims d(ShardRows(w), w.cols);
  const int64_t shard_blocks = d.bands * d.blocks;
  ParallelChunks(w.shards * shard_blocks, [&](int64_t begin, int64_t end) {
    alignas(64) uint16_t patch[kBandRows * kBlockCols];
    alignas(64) uint16_t run[kBlockWeights + 4];
    for (int64_t index = begin; index < end; ++index) {
      const Block b = BitmapBlock(w, d, index);
      LoadPatch(w, b.row0, b.row_end, b.col0, kBandRows, kBlockCols, patch);
      const int64_t tile0 = b.block * kBlockTiles;
      const int tiles = static_cast<int>(std::min<int64_t>(kBlockTiles, d.tiles - tile0));
      const uint32_t* mask = masks + b.shard * d.masks() + (b.band * d.tiles + tile0) * kLanes;
      uint16_t* p = run;
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

namespace {

Block CslTile(const DenseView& w, const tiled_csl::Dims& d, int64_t index) {
  Block b;
  b.block = index % d.tiles;
  b.band = index / d.tiles % d.bands;
  b.shard = index / (d.tiles * d.bands);
  b.row0 = b.shard * d.rows + b.band * tiled_csl::kTileRows;
  b.row_end = std::min(w.rows, (b.shard + 1) * d.rows);
  b.col0 = b.block * tiled_csl::kTileCols;
  return b;
}

}  // namespace

int64_t CountTiledCsl(const DenseView& w, uint32_t* offsets) {
  using namespace tiled_csl;
  const Dims d(ShardRows(w), w.cols);
  ParallelChunks(w.shards * d.bands * d.tiles, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Block b = CslTile(w, d, index);
      const int64_t row_end = std::min(b.row_end, b.row0 + kTileRows);
      const int64_t col_end = std::min(w.cols, b.col0 + kTileCols);
      int count = 0;
      for (int64_t r = b.row0; r < row_end; ++r)
        for (int64_t c = b.col0; c < col_end; ++c) count += w.data[r * w.cols + c] != 0;
      offsets[b.shard * d.offsets() + b.band * d.tiles + b.block] = CeilDiv(count, kVector);
    }
  });
  int64_t capacity = kVector;
  for (int64_t s = 0; s < w.shards; ++s)
    capacity = std::max(capacity, PrefixSum(offsets + s * d.offsets(), d.bands * d.tiles));
  return capacity;
}

void FillTiledCsl(const DenseView& w, const uint32_t* offsets, int64_t capacity,
                  uint16_t* positions, uint16_t* values) {
  using namespace tiled_csl;
  const Dims d(ShardRows(w), w.cols);
  ParallelChunks(w.shards * d.bands * d.tiles, [&](int64_t begin, int64_t end) {
    alignas(64) uint16_t patch[kTileWeights];
    // Value and position, by the bank they store to.
    alignas(64) uint32_t queue[32][kTileWeights / 32 + 2];
    for (int64_t index = begin; index < end; ++index) {
      const Block b = CslTile(w, d, index);
      LoadPatch(w, b.row0, b.row_end, b.col0, kTileRows, kTileCols, patch);
      int size[32] = {};
      for (int r = 0; r < kTileRows; ++r)
        for (int c = 0; c < kTileCols; c += 2) {  // a pair shares its bank
          uint32_t pair;
          std::memcpy(&pair, patch + r * kTileCols + c, sizeof pair);
          const uint32_t position = Position(r, c);
          const int bank = Bank(position);
          uint32_t* q = queue[bank] + size[bank];  // store always, advance if kept
          const int first = (pair & 0xffff) != 0, second = pair >> 16 != 0;
          q[0] = pair << 16 | position;
          q[first] = (pair & 0xffff0000u) | (position + 1);
          size[bank] += first + second;
        }
      const uint32_t* offset = offsets + b.shard * d.offsets() + b.band * d.tiles + b.block;
      const int64_t first = b.shard * capacity + static_cast<int64_t>(offset[0]) * kVector;
      const int64_t room = static_cast<int64_t>(offset[1] - offset[0]) * kVector;
      int64_t n = 0;
      auto emit = [&](uint32_t entry) {
        positions[first + n] = static_cast<uint16_t>(entry);
        values[first + n] = static_cast<uint16_t>(entry >> 16);
        ++n;
      };
      // Rounds that every bank has an entry for, then those that only some have.
      const auto [shortest, longest] = std::minmax_element(size, size + 32);
      for (int round = 0; round < *shortest; ++round)
        for (int bank = 0; bank < 32; ++bank) emit(queue[bank][round]);
      for (int round = *shortest; round < *longest; ++round)
        for (int bank = 0; bank < 32; ++bank)
          if (round < size[bank]) emit(queue[bank][round]);
      if (n == room) continue;
      int empty = 0;  // a tile with room left has a zero
      while (patch[PositionRow(empty) * kTileCols + PositionCol(empty)]) ++empty;
      for (; n < room; ++n) {
        positions[first + n] = static_cast<uint16_t>(kPadding | empty);
        values[first + n] = 0;
      }
    }
  });
  for (int64_t s = 0; s < w.shards; ++s) {
    const int64_t used = static_cast<int64_t>(offsets[(s + 1) * d.offsets() - 1]) * kVector;
    for (int64_t i = s * capacity + used; i < (s + 1) * capacity; ++i) {
      positions[i] = kPadding;
      values[i] = 0;
    }
  }
}

}  // namespace flashllm
