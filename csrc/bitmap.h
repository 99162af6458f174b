// Bitmap: one bit a weight and the nonzeros, laid out as tensor cores take them.
//
// W [M, K] is cut into row blocks (shards), bands of 16 rows, blocks of 16 x 256
// and tiles of 16 x 64. A tile is the A operand of four mma.m16n8k16 steps, with the
// order of k permuted so that every lane owns sixteen neighbouring columns:
//
//        columns   0..15    16..31   32..47   48..63       lane = 4 g + t
//   row g        [ t = 0  |  t = 1 |  t = 2 |  t = 3 ]      g = 0..7
//   row g + 8    [        |        |        |        ]      step i takes columns
//                  i=0 1 2 3                                16 t + 4 i + 0..3
//
// masks   uint32 [bands][tiles][32]: byte i of word `lane` is that lane's step i;
//         bits 0-3 are row g, bits 4-7 row g + 8, columns 16 t + 4 i + 0..3.
// values  16-bit: block by block, tile by tile, step by step, lane by lane, bit by bit.
// offsets uint32 [bands * blocks + 1]: where each block's values start, in vectors of 8.
//
// Why so: a GPU lane finds its four runs of a tile with one byte-packed prefix sum, reads
// runs that lie side by side across the warp (few bank conflicts), and its own bits are
// its own mma fragment. A CPU reads the same bytes as 32 weights a vector register: the
// step bytes of lanes 4g..4g+3 are one 32-bit expand mask over one contiguous run.
#pragma once
#include <cstdint>

namespace flashllm::bitmap {

constexpr int kBandRows = 16;
constexpr int kTileCols = 64;
constexpr int kBlockTiles = 4;
constexpr int kBlockCols = kTileCols * kBlockTiles;
constexpr int kBlockWeights = kBandRows * kBlockCols;
constexpr int kSteps = 4;
constexpr int kLanes = 32;
constexpr int kVector = 8;  // values a unit of `offsets`: 16 bytes, one bulk-copy granule

inline constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sizes of one shard of R rows and K columns.
struct Dims {
  int64_t rows, cols, bands, tiles, blocks;
  Dims(int64_t r, int64_t k)
      : rows(r),
        cols(k),
        bands(CeilDiv(r, kBandRows)),
        tiles(CeilDiv(k, kTileCols)),
        blocks(CeilDiv(k, kBlockCols)) {}
  int64_t masks() const { return bands * tiles * kLanes; }
  int64_t offsets() const { return bands * blocks + 1; }
};

// Row and column inside a tile of bit `bit` (0..7) of step `step` of `lane`.
inline constexpr int TileRow(int lane, int bit) { return (lane >> 2) + ((bit >> 2) << 3); }
inline constexpr int TileCol(int lane, int step, int bit) {
  return ((lane & 3) << 4) + (step << 2) + (bit & 3);
}

}  // namespace flashllm::bitmap
