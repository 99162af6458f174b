// A dense [M, K] matrix in row and column blocks (shards), and how a lane reaches into it.
#pragma once
#include <cstring>
#include <type_traits>

#include "spmm.h"

namespace flashllm::cuda {

// What of a shard lies at and behind one of its weights; nothing where rows or cols is negative.
struct Patch {
  uint16_t* data;
  int64_t stride;
  int rows, cols;
};

__device__ inline Patch PatchAt(const Dense& d, int64_t shard, int64_t row, int64_t col) {
  const int64_t row0 = shard % d.row_blocks * d.shard_rows;
  const int64_t col0 = shard / d.row_blocks * d.shard_cols;
  constexpr int64_t kMost = 1 << 20;  // more than any block has
  return {d.data + (row0 + row) * d.cols + col0 + col, d.cols,
          static_cast<int>(min(min(d.rows - row0, d.shard_rows) - row, kMost)),
          static_cast<int>(min(min(d.cols - col0, d.shard_cols) - col, kMost))};
}

// Whether `halves` neighbours from a multiple of `halves` on lie inside or outside together, and
// are aligned: whether they are one load.
inline bool IsAligned(const Dense& d, int halves) {
  return reinterpret_cast<uintptr_t>(d.data) % (2 * halves) == 0 && d.cols % halves == 0 &&
         (d.shard_cols % halves == 0 || d.shard_cols >= d.cols);
}

// What a lane loads at once: T where rows are aligned to it, else one weight.
template <bool kAligned, typename T>
using Vector = std::conditional_t<kAligned, T, uint16_t>;

// Pairs of neighbours from (row, col) on, a V at once; zeros outside.
template <typename V, int kWords>
__device__ inline void LoadRow(const Patch& p, int row, int col, uint32_t (&words)[kWords]) {
  constexpr int kHalves = sizeof(V) / 2;
  const uint16_t* from = p.data + row * p.stride + col;
  uint16_t halves[2 * kWords] = {};
#pragma unroll
  for (int i = 0; i < 2 * kWords; i += kHalves)
    if (row < p.rows && col + i < p.cols) {
      const V v = __ldg(reinterpret_cast<const V*>(from + i));
      memcpy(halves + i, &v, sizeof v);
    }
  memcpy(words, halves, sizeof words);
}

template <typename V, int kWords>
__device__ inline void StoreRow(const Patch& p, int row, int col, const uint32_t (&words)[kWords]) {
  constexpr int kHalves = sizeof(V) / 2;
  uint16_t* to = p.data + row * p.stride + col;
#pragma unroll
  for (int i = 0; i < 2 * kWords; i += kHalves)
    if (row < p.rows && col + i < p.cols) {
      V v;
      memcpy(&v, reinterpret_cast<const uint16_t*>(words) + i, sizeof v);
      *reinterpret_cast<V*>(to + i) = v;
    }
}

}  // namespace flashllm::cuda
