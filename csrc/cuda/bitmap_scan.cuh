// Where the runs of a bitmap's tile start, counted by tensor cores.
//
// A tile's 32 mask words, one a lane, are the B operand of a 1-bit mma as they stand: column g
// holds the words of lanes 4 g .. 4 g + 3. So m16n8k128 counts, for every lane group g, any
// choice of bits that the constant operand A names, and the sums over the groups before a lane's
// own are one mma of bytes. The lanes before it in its own group, and its own bits before a
// given one, are m16n8k256 with the word as A. No shuffle, and three dependent mma deep.
//
// Fragments: lane (g, t) of a result holds rows g, g + 8 of columns 2 t, 2 t + 1. Throughout,
// column 2 t + i of rows g and g + 8 is steps 2 i and 2 i + 1 of lane (g, t).
#pragma once
#include "ptx.cuh"

namespace flashllm::cuda {

// One number a step, in the order of a fragment.
using Starts = int[4];
__device__ constexpr int kStartOfStep[4] = {0, 2, 1, 3};

// A lane's mask, as operand A of 256 bits: rows g with steps 0 and 2 in bytes 0 and 2, rows g + 8
// with steps 1 and 3 there. The second half has them again, so that every bit counts twice, for
// a value's two bytes; swapped, so that operand B is two registers and not one that is copied.
struct Word {
  uint32_t a[4];
  __device__ __forceinline__ explicit Word(uint32_t mask)
      : a{mask, mask >> 8, ptx::Permute(mask, 0x1032), ptx::Permute(mask, 0x2103)} {}
};

class RunScan {
 public:
  __device__ __forceinline__ explicit RunScan(int lane) {
    const int g = lane >> 2, t = lane & 3, odd = g & 1;  // odd: of steps 2 and 3
    before_[0] = odd ? 0x0000ffffu : 0;
    before_[1] = odd ? 0x00ffffffu : 0x000000ffu;
    through_[0] = odd ? ~0u : 0x0000ffffu;
    through_[1] = ~0u;
    for (int pair = 0; pair <= 4; ++pair) {
      // Of a lane's own byte the bits below this pair; of the bytes of lanes before it all.
      const uint32_t own = t == g >> 1 ? (1u << 2 * pair) - 1 : 0;
      const uint32_t bits = pair == 0 && t < g >> 1 ? 0xff : own;
      below_[pair][0] = odd ? bits << 16 : bits;
      below_[pair][1] = odd ? bits : bits << 16;
    }
    // Bytes: groups 2 t, 2 t + 1 of a first count, then of a second. Twice: a value is 2 bytes.
    const uint32_t l0 = 2 * t < g ? 2 : 0, l1 = 2 * t + 1 < g ? 2 : 0;
    groups_[0] = (2 - l0) | (2 - l1) << 8 | l0 << 16 | l1 << 24;
    groups_[1] = (2 - l0) << 16 | (2 - l1) << 24;
    groups_[2] = 0;
    groups_[3] = l0 | l1 << 8;
    all_[0] = all_[1] = 0x02020000u;
    // Or they are derived anew for every tile.
    Keep(before_), Keep(through_), Keep(groups_), Keep(all_);
    for (int pair = 0; pair <= 4; ++pair) Keep(below_[pair]);
  }

  // From the addresses of a tile (four times the same) to those of its runs and of its end.
  __device__ __forceinline__ void Tile(const Word& mask, const Starts& tile, Starts& runs,
                                       Starts& end) const {
    int first[4], second[4];
    // Of each lane group: the bits of the steps before a step, and of one step more.
    ptx::CountBits(first, before_, mask.a[0]);
    // Of yet one more, and all.
    ptx::CountBits(second, through_, mask.a[0]);
    const uint32_t a = Bytes(first), b = Bytes(second);
    ptx::CountBits(runs, tile, mask.a, below_[0][0], below_[0][1]);
    ptx::MmaBytes(runs, groups_, a, b);
    ptx::MmaBytes(end, tile, all_, b);  // last: `end` may be `tile`
  }

  // Of a lane's runs: where pair kPair, bits 2 kPair and 2 kPair + 1 of a step, starts.
  template <int kPair>
  __device__ __forceinline__ void Pair(const Word& mask, const Starts& runs, Starts& starts) const {
    ptx::CountBits(starts, runs, mask.a, below_[kPair][0], below_[kPair][1]);
  }

 private:
  template <int kCount>
  static __device__ __forceinline__ void Keep(uint32_t (&v)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = ptx::Keep(v[i]);
  }
  // At most 128 each: four lanes' words.
  static __device__ __forceinline__ uint32_t Bytes(const int (&d)[4]) {
    return d[0] + d[1] * 256 + d[2] * 65536 + (static_cast<uint32_t>(d[3]) << 24);
  }

  uint32_t before_[2], through_[2], below_[5][2], groups_[4], all_[2];
};

}  // namespace flashllm::cuda
