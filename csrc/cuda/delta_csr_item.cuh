// A Delta-CSR item, found: what encoding, converting and multiplying share.
#pragma once
#include <cstdint>

#include "../delta_csr.h"

namespace flashllm::cuda {

struct DeltaItem {
  int64_t value, word;  // its first value, the word of its bases, counted from its shard's
  int groups;           // -1: outside the buffers
};

// Bits of a code, by the offsets of a shard with so many items.
__device__ inline int LoadBits(const uint32_t* offsets, int64_t items) {
  return __ldg(offsets + items + 1) == 4 ? 4 : 8;
}

// By its shard's offsets, which may lie (garbage); capacities are of a shard, in elements.
__device__ inline DeltaItem LocateItem(const uint32_t* offsets, int64_t item, int bits,
                                       int64_t block_cols, int64_t capacity,
                                       int64_t index_capacity) {
  using namespace delta_csr;
  const int64_t first = __ldg(offsets + item), last = __ldg(offsets + item + 1);
  const bool valid = first <= last && last - first <= Groups(block_cols) &&
                     last * kGroupValues <= capacity &&
                     IndexStart(item + 1, last, bits) <= index_capacity;
  if (!valid) return {0, 0, -1};
  return {first * kGroupValues, IndexStart(item, first, bits), static_cast<int>(last - first)};
}

}  // namespace flashllm::cuda
