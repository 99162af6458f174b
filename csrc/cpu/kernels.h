// What one instruction set provides, and how the band kernels are called.
//
// A band kernel multiplies one band of W (16 rows of a bitmap) with a group of `tokens` columns
// of x and writes fp32 sums[token][row]; an item kernel does so with a row of Delta-CSR in a block
// of columns. Conversion, bias and activation are the caller's.
#pragma once
#include <cstdint>

#include "../bitmap.h"
#include "../delta_csr.h"
#include "half.h"

namespace flashllm {

constexpr int kMaxTokens = 32;  // a group: 16 KiB of accumulators, half an L1

// x as the bitmap kernels read it, for each tile, step i and token: columns 16 t + 4 i + 0..3
// of the tile for t = 0..3, each four written twice (rows g and g + 8 of a lane's byte).
// fp32: 32 floats [tiles][4][tokens][32]; bf16: the same with halfwords.
struct BitmapBand {
  const uint32_t* masks;    // this band's [tiles][32]
  const uint32_t* offsets;  // this band's [blocks + 1]
  const uint16_t* values;   // the shard's, `capacity` of them
  int64_t capacity;
  int64_t tiles;
  const void* x;
  int tokens;
};

enum class Status {
  kOk,
  kOutOfRange,  // an offset, a mask or a code points outside
  kSubnormal,   // bf16 dot only: the instruction would flush a subnormal weight to zero
};

// An item of Delta-CSR whose groups lie inside the buffers. x is finite.
struct DeltaCsrItem {
  const uint32_t* index;   // its bases, then its codes
  const uint16_t* values;  // its own
  int64_t groups;
  int bits;
  const float* x;    // [1 + columns][tokens]: zeros, then the block's columns
  uint32_t columns;  // of a block
  int tokens;        // ItemTokens
};

// x is filled up by zeros to as many tokens as there is code for.
inline constexpr int ItemTokens(int tokens) {
  return tokens == 1 ? 1 : tokens <= 4 ? 4 : tokens <= 8 ? 8 : tokens <= 16 ? 16 : kMaxTokens;
}

using DeltaCsrFn = Status (*)(const DeltaCsrItem&, float* sums);

using BitmapFn = Status (*)(const BitmapBand&, float* sums);

// The values of a tile of W, row by row, in a bitmap's order. bits: each row's 64. rows: where its
// values start; moved behind them. masks: the tile's; they may want fewer than the bits have.
// Returns the end of what is written, behind which it writes up to 31 values more.
using ReorderFn = uint16_t* (*)(const uint64_t (&bits)[bitmap::kBandRows],
                                const uint16_t* (&rows)[bitmap::kBandRows], const uint32_t* masks,
                                uint16_t* out);

struct Kernels {
  const char* name;
  BitmapFn bitmap_f16, bitmap_bf16;
  BitmapFn bitmap_bf16_dot;  // x in bf16; null where the instruction is missing
  ReorderFn reorder;         // null: encode.cc does it
  DeltaCsrFn delta_csr_f16, delta_csr_bf16;
};

const Kernels& Active();  // spmm.cc

extern const Kernels kPortableKernels;
#ifdef FLASHLLM_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// Values of one block, readable for 32 elements past its end. The last blocks of a shard
// are copied to `scratch`, after their masks were counted; null if they reach outside.
static inline const uint16_t* BlockValues(const BitmapBand& band, int64_t block,
                                          uint16_t (&scratch)[bitmap::kBlockWeights + 32]) {
  const int64_t first = static_cast<int64_t>(band.offsets[block]) * bitmap::kVector;
  if (first + bitmap::kBlockWeights + 32 <= band.capacity) return band.values + first;
  const int64_t tile = block * bitmap::kBlockTiles;
  const int64_t end =
      tile + bitmap::kBlockTiles < band.tiles ? tile + bitmap::kBlockTiles : band.tiles;
  int64_t count = 0;
  for (int64_t i = tile * bitmap::kLanes; i < end * bitmap::kLanes; ++i)
    count += __builtin_popcount(band.masks[i]);
  if (first + count > band.capacity) return nullptr;
  std::memcpy(scratch, band.values + first, count * sizeof(uint16_t));
  return scratch;
}

}  // namespace flashllm
