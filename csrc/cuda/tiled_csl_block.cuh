// A Tiled-CSL block, found and walked: what converting and multiplying share.
#pragma once
#include <cstdint>

#include "../tiled_csl.h"

namespace flashllm::cuda {

struct CslBlock {
  const uint32_t* index;  // its code words
  int64_t value;          // its first value, counted from the shard-major buffer's start
  int chunks, tails;
};

// The offsets before and behind a block: chunks, tail vectors, the same again.
__device__ inline uint4 LoadOffsets(const uint32_t* o) {
  return make_uint4(__ldg(o), __ldg(o + 1), __ldg(o + 2), __ldg(o + 3));
}

// The block between two offsets. What offsets that lie (garbage) would place outside the buffers
// is empty. Capacities are of a shard, in units of 16 bytes.
__device__ inline CslBlock LocateBlock(const uint32_t* index, uint4 offsets, int64_t index_capacity,
                                       int64_t capacity, int64_t shard) {
  using namespace tiled_csl;
  const int64_t c0 = offsets.x, t0 = offsets.y, c1 = offsets.z, t1 = offsets.w;
  const bool valid = c0 <= c1 && c1 - c0 <= kMaxChunks && t0 <= t1 && t1 - t0 <= kMaxTail &&
                     ValueStart(c1, t1) <= capacity * 8 && IndexStart(c1, t1) <= index_capacity * 4;
  if (!valid) return {index, 0, 0, 0};
  return {index + shard * index_capacity * 4 + IndexStart(c0, t0),
          shard * capacity * 8 + ValueStart(c0, t0), static_cast<int>(c1 - c0),
          static_cast<int>(t1 - t0)};
}

// f(position, at) for the weights of a block, by all kThreads threads: position 64.. in the
// scratch, at the value, counted from the block's first.
template <int kThreads, typename F>
__device__ inline void ForEachWeight(const CslBlock& b, F f) {
  using namespace tiled_csl;
  static_assert(kThreads >= kLists);
  const int list = threadIdx.x;
  if (list < kLists) {
    int row = 0, before = 0;
    for (int entry = 0; entry < b.chunks * kChunkEntries; ++entry) {
      const int chunk = entry / kChunkEntries, e = entry % kChunkEntries;
      const uint32_t word = __ldg(b.index + chunk * kChunkWords + list / 2);
      const int code = word >> (8 * e + 4 * (list & 1)) & 15;
      row = min(row + code, kRows);  // garbage must stay in the scratch
      if (code != kFiller && (code > 0 || before == kFiller))
        f(row * kLists + list,
          chunk * kChunkValues + (list & 1) * (kChunkValues / 2) + list / 2 * kChunkEntries + e);
      before = code;
    }
  }
  const uint32_t* words = b.index + b.chunks * kChunkWords;
  for (int i = threadIdx.x; i < b.tails * kVector; i += kThreads) {
    const int position = __ldg(words + i / 2) >> (16 * (i & 1)) & 0xffff;
    if (position >= kLists && position < (kRows + 1) * kLists)
      f(position, b.chunks * kChunkValues + i);
  }
}

}  // namespace flashllm::cuda
