// Delta-CSR: rows of nonzeros with short steps between their columns, dealt out to 32 lanes.
//
// W [M, K] is cut into row blocks (shards) and blocks of up to 12288 columns, as even as multiples
// of 64 allow. Of a row in a block, an item, the nonzeros are entries by rising column; where the
// next one is `filler` columns away or more, entries without a weight, fillers, go before it, each
// `filler` columns further. Lane l of 32 takes the entries [l T / 32, (l + 1) T / 32) of T:
//
//   base    its first weight's column in the block
//   codes   signed steps of 8 bits, or unsigned ones of 4, from `base - 1` on:
//     filler (127 or 15)  so many columns further, no weight; another filler or a weight follows
//     0                   behind a filler: a weight right there; else no weight
//     any other           a weight so many columns further
//
// Fillers before a lane's first weight and behind its last have code 0, and a lane without weights
// base 0. All lists of an item are filled up with code 0 to as many groups of four entries as the
// longest needs, ceil(T / 128). Entries without a weight are dead: they hold +0. The order of a
// list's entries is free, as long as the codes say where they are, no entry leads outside of
// [-1, the block's columns that W has), and an item has no more groups than the columns of a block
// fill; `encode` writes them by rising column.
//
//   item     block * rows + row
//   values   half   [capacity]        a group: [32 lanes][4 entries]
//   index    uint32 [index_capacity]  an item: bases uint16 [32], then of each group codes
//                                     [32 lanes][4 entries], entry 0 lowest
//   offsets  uint32 [items + 2]       groups before each item, and in all; then 4 or 8, the bits of
//                                     a code, those that take fewer bytes, of equals 8
//
// item i starts at value 128 offsets[i] and at word 16 i + 4 bits offsets[i] of index
#pragma once
#include <cstdint>

#include "bitmap.h"

namespace flashllm::delta_csr {

constexpr int kMaxBlockCols = 12288;  // x of 8 tokens of so many fits into 227 KB of shared memory
constexpr int kLanes = 32;
constexpr int kSteps = 4;                      // of a group
constexpr int kGroupValues = kLanes * kSteps;  // halves
constexpr int kBaseWords = kLanes / 2;         // uint32

using bitmap::CeilDiv;

struct Dims {
  int64_t rows, cols, block_cols, blocks, items;
  Dims(int64_t r, int64_t k)
      : rows(r),
        cols(k),
        block_cols(CeilDiv(CeilDiv(k, CeilDiv(k, kMaxBlockCols)), 64) * 64),
        blocks(CeilDiv(k, block_cols)),
        items(blocks * r) {}
  int64_t offsets() const { return items + 2; }
};

inline constexpr int Filler(int bits) { return bits == 8 ? 127 : 15; }

// Words of a group's codes.
inline constexpr int GroupWords(int bits) { return kGroupValues * bits / 32; }

// Before a weight `gap` columns behind the one before.
inline constexpr int Fillers(int gap, int bits) { return gap / Filler(bits); }

inline constexpr int64_t Groups(int64_t entries) { return CeilDiv(entries, kGroupValues); }

// A shard's bits of a code, of the groups that it has with 8 and with 4.
inline constexpr int Bits(int64_t groups8, int64_t groups4) {
  constexpr int kHalves = 2 * kGroupValues;
  return groups4 * (kHalves + 4 * GroupWords(4)) < groups8 * (kHalves + 4 * GroupWords(8)) ? 4 : 8;
}

// Where a lane of an item with `entries` entries starts. So entry i is in lane
// ((i + 1) kLanes - 1) / entries.
inline constexpr int64_t LaneStart(int lane, int64_t entries) { return lane * entries / kLanes; }

// Where an item starts in index, with `groups` before it; the capacity that all items take.
inline constexpr int64_t IndexStart(int64_t item, int64_t groups, int bits) {
  return item * kBaseWords + groups * GroupWords(bits);
}

}  // namespace flashllm::delta_csr
