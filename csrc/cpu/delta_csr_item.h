// An item of Delta-CSR times a group of tokens, for each instruction set's own file.
//
// All in an anonymous namespace: files built for different instruction sets must not share code.
#pragma once
#include <cstring>

#include "kernels.h"

namespace flashllm {
namespace {

template <int N>
struct Floats {
  typedef float Vector __attribute__((vector_size(N * sizeof(float))));
};
template <>
struct Floats<1> {
  typedef float Vector;
};

// T: item.tokens. Widen: floats of a register, and a function that makes floats of the four halves
// of a lane's group. Every entry is multiplied: dead ones hold +0, and x is finite.
template <typename Widen, int kBits, int T>
Status ItemProduct(const DeltaCsrItem& item, float* sums) {
  using namespace delta_csr;
  constexpr int kFloats = T < Widen::kFloats ? T : Widen::kFloats;
  using Vector = typename Floats<kFloats>::Vector;
  // Of one token four sums, which need not wait for each other.
  Vector acc[T == 1 ? kSteps : T / kFloats] = {};
  // One column further than a lane's entry, as x has a column before those of the block.
  uint32_t at[kLanes];
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(item.index);
  for (uint32_t& a : at) {
    uint16_t base;
    std::memcpy(&base, codes, sizeof base);
    codes += sizeof base;
    a = base;
  }
  const uint16_t* value = item.values;
  for (int64_t group = 0; group < item.groups; ++group)
    for (int lane = 0; lane < kLanes; ++lane, codes += kBits / 2, value += kSteps) {
      uint32_t word = 0, a = at[lane], of_x[kSteps];
      std::memcpy(&word, codes, kBits / 2);
      bool outside = false;
      for (int i = 0; i < kSteps; ++i) {
        a += kBits == 8 ? static_cast<uint32_t>(static_cast<int8_t>(word >> (8 * i)))
                        : word >> (4 * i) & 15;
        of_x[i] = a;
        outside |= a > item.columns;
      }
      if (outside) return Status::kOutOfRange;
      at[lane] = a;
      float v[kSteps];
      Widen::Call(value, v);
      for (int i = 0; i < kSteps; ++i)
        for (int j = 0; j < T / kFloats; ++j) {
          Vector x;
          std::memcpy(&x, item.x + static_cast<size_t>(of_x[i]) * T + j * kFloats, sizeof x);
          acc[T == 1 ? i : j] += v[i] * x;
        }
    }
  if (T == 1) acc[0] = (acc[0] + acc[1]) + (acc[2] + acc[3]);
  std::memcpy(sums, acc, T * sizeof *sums);
  return Status::kOk;
}

template <typename Widen, int kBits>
Status ItemProduct(const DeltaCsrItem& item, float* sums) {
  switch (item.tokens) {
    case 1:
      return ItemProduct<Widen, kBits, 1>(item, sums);
    case 4:
      return ItemProduct<Widen, kBits, 4>(item, sums);
    case 8:
      return ItemProduct<Widen, kBits, 8>(item, sums);
    case 16:
      return ItemProduct<Widen, kBits, 16>(item, sums);
    default:
      return ItemProduct<Widen, kBits, kMaxTokens>(item, sums);
  }
}

template <typename Widen>
Status ItemProduct(const DeltaCsrItem& item, float* sums) {
  return item.bits == 8 ? ItemProduct<Widen, 8>(item, sums) : ItemProduct<Widen, 4>(item, sums);
}

}  // namespace
}  // namespace flashllm
