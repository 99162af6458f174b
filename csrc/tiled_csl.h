// Tiled-CSL: every nonzero beside its position in a tile (the idea of Flash-LLM, VLDB 2024).
//
// W [M, K] is cut into row blocks (shards), bands of 128 rows and tiles of 128 x 64.
//
// positions uint16: bit 15 marks padding; bits 0-12 are row * 64 + (col ^ swizzle(row)),
//           the halfword in a 16 KiB shared-memory tile whose rows ldmatrix reads
//           without bank conflicts.
// values    16-bit, parallel to positions (apart, so that values can be differentiated).
// offsets   uint32 [bands * tiles + 1]: where each tile starts, in vectors of 8.
//
// Inside a tile the nonzeros go round the 32 shared-memory banks, so that the stores of a
// warp rarely meet. Padding to whole vectors holds +0 at a position that is zero in W: to
// scatter it or to accumulate it changes nothing.
#pragma once
#include <cstdint>

#include "bitmap.h"

namespace flashllm::tiled_csl {

constexpr int kTileRows = 128;
constexpr int kTileCols = 64;
constexpr int kTileWeights = kTileRows * kTileCols;
constexpr int kVector = 8;
constexpr uint16_t kPadding = 0x8000;
constexpr uint16_t kPositionMask = 0x1fff;

using bitmap::CeilDiv;

struct Dims {
  int64_t rows, cols, bands, tiles;
  Dims(int64_t r, int64_t k)
      : rows(r), cols(k), bands(CeilDiv(r, kTileRows)), tiles(CeilDiv(k, kTileCols)) {}
  int64_t offsets() const { return bands * tiles + 1; }
};

inline constexpr int Position(int row, int col) {
  return row * kTileCols + (col ^ ((row & 7) << 3));
}
inline constexpr int PositionRow(int position) { return (position & kPositionMask) >> 6; }
inline constexpr int PositionCol(int position) {
  return (position & 63) ^ ((PositionRow(position) & 7) << 3);
}
inline constexpr int Bank(int position) { return (position >> 1) & 31; }

}  // namespace flashllm::tiled_csl
