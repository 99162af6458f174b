// Tiled-CSL: nonzeros as short steps down the shared-memory banks that a GPU expands them in.
//
// W [M, K] is cut into row blocks (shards), bands of 64 rows and blocks of 64 x 128. A dense
// block is 16 KiB in the order of mma fragments, 128 rows of 32 banks, 2 halves a bank:
//
//   tile   = (row / 16, col / 64)                            8 tiles of 16 x 64
//   lane   = 4 (row % 8) + col % 64 / 16                     as in a bitmap: 16 columns a lane
//   step   = col % 16 / 4                                    one mma.m16n8k16 each
//   j      = row % 16 / 8 + 2 (col % 4 / 2)                  register of the A fragment
//   half   = tile * 1024 + step * 256 + lane * 8 + j * 2 + col % 2
//
// Half i lies in row 1 + i / 64 of a scratch whose row 0 is a bin that nobody reads, and belongs
// to list i % 64 (bank i / 2 % 32). Lists hold their nonzeros by rising row, as a value and a
// code of 4 bits, the rows from the entry before (from the bin at first):
//
//   1..14   a weight that many rows further
//   15      filler: 15 rows further, no weight; a weight follows at once
//   0       behind a filler a weight right there; before all weights padding, in the bin
//
// All lists of a block have 4 C entries, C chunks of 4; the last weights of lists that are
// longer go to the block's tail, as a value and a position 64 * row + list. Tails are filled up
// to vectors of 8 by position 0. Dead entries (fillers and padding) hold +0.
//
//   chunk   values  half [2 lists][32 banks][4 entries]   codes uint32 [32 banks]: byte i has
//                                                         entry i, list 2 b in its low nibble
//   vector  values  half [8]                              positions uint16 [8]
//
// values  half   [capacity]             block after block: its chunks, then its tail
// index   uint32 [index_capacity]       the same of codes and positions
// offsets uint32 [bands * blocks + 1][2]  chunks and tail vectors before each block
#pragma once
#include <cstdint>

#include "bitmap.h"

namespace flashllm::tiled_csl {

constexpr int kBlockRows = 64;
constexpr int kBlockCols = 128;
constexpr int kBlockWeights = kBlockRows * kBlockCols;
constexpr int kLists = 64;
constexpr int kRows = kBlockWeights / kLists;  // of a list; rows 1..kRows of the scratch
constexpr int kFiller = 15;
constexpr int kVector = 8;        // weights a vector of the tail
constexpr int kChunkEntries = 4;  // of each list
constexpr int kMaxChunks = kRows / kChunkEntries;
constexpr int kMaxTail = kBlockWeights / kVector;
constexpr int kChunkValues = kChunkEntries * kLists;  // halves
constexpr int kChunkWords = kLists / 2;               // uint32
constexpr int kVectorWords = kVector / 2;

using bitmap::CeilDiv;

struct Dims {
  int64_t rows, cols, bands, blocks;
  Dims(int64_t r, int64_t k)
      : rows(r), cols(k), bands(CeilDiv(r, kBlockRows)), blocks(CeilDiv(k, kBlockCols)) {}
  int64_t offsets() const { return 2 * (bands * blocks + 1); }
};

// Where a dense block has a weight, and back. A tail's position is that half + kLists.
inline constexpr int Half(int row, int col) {
  const int tile = row >> 4 << 1 | col >> 6, step = col >> 2 & 3;
  const int lane = (row & 7) << 2 | (col >> 4 & 3), j = (row >> 3 & 1) | (col >> 1 & 1) << 1;
  return tile << 10 | step << 8 | lane << 3 | j << 1 | (col & 1);
}
inline constexpr int HalfRow(int i) { return i >> 11 << 4 | (i >> 1 & 1) << 3 | (i >> 5 & 7); }
inline constexpr int HalfCol(int i) {
  return (i >> 10 & 1) << 6 | (i >> 3 & 3) << 4 | (i >> 8 & 3) << 2 | (i >> 2 & 1) << 1 | (i & 1);
}

// Where a block's chunks start; its tail follows them, the next block its tail.
inline constexpr int64_t ValueStart(int64_t chunks, int64_t tails) {
  return chunks * kChunkValues + tails * kVector;
}
inline constexpr int64_t IndexStart(int64_t chunks, int64_t tails) {
  return chunks * kChunkWords + tails * kVectorWords;
}

}  // namespace flashllm::tiled_csl
