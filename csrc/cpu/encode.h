// Encoders of dense 16-bit matrices, in C++ on all cores. Bits decide: a weight is stored
// unless all sixteen are zero, so -0.0, NaN payloads and subnormals survive.
#pragma once
#include <cstdint>
#include <vector>

namespace flashllm {

struct DenseView {
  const uint16_t* data;  // row-major
  int64_t rows, cols;    // M, K
  int64_t shards;        // row blocks of ceil(M / shards)
};

// The same matrix without its zeros, as compressed-tensors' sparse-bitmask holds it: a bit a
// weight, lowest first, rows in whole bytes, and the values of the set bits row by row. A value of
// -0.0 is a zero here.
struct PackedView {
  const uint8_t* bits;
  const int64_t* starts;  // of a row in `values`
  const uint16_t* values;
  int64_t rows, cols, shards;
  bool plain;  // no value is -0.0: the bits are the masks
};

// Throws std::invalid_argument where bits, starts and `count` values disagree: from here on the
// bits alone decide what is read.
PackedView CheckPacked(const uint8_t* bits, const int64_t* starts, const uint16_t* values,
                       int64_t rows, int64_t cols, int64_t count);

// Both run in two calls: the first sizes `values` (the largest shard, in elements), so
// that the caller allocates; the second fills. Buffers are [shards, ...], row-major.
template <typename View>
int64_t CountBitmap(const View& w, uint32_t* masks, uint32_t* offsets);
template <typename View>
void FillBitmap(const View& w, const uint32_t* masks, const uint32_t* offsets, int64_t capacity,
                uint16_t* values);

struct DeltaCsrCapacity {
  int64_t values, index;  // elements
};
DeltaCsrCapacity CountDeltaCsr(const DenseView& w, uint32_t* offsets);
void FillDeltaCsr(const DenseView& w, const uint32_t* offsets, DeltaCsrCapacity capacity,
                  uint32_t* index, uint16_t* values);

}  // namespace flashllm
