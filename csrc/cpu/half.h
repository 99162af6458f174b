// fp16 and bf16 conversions that need no instruction set: round to nearest even, NaN kept.
// Static on purpose: files built for different instruction sets must not share code.
#pragma once
#include <cstdint>
#include <cstring>

namespace flashllm {

enum class Half { kF16, kBF16 };

static inline float BitsToFloat(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}
static inline uint32_t FloatToBits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}

static inline float BF16ToFloat(uint16_t h) { return BitsToFloat(static_cast<uint32_t>(h) << 16); }

static inline uint16_t FloatToBF16(float f) {
  const uint32_t u = FloatToBits(f);
  if ((u & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(u >> 16 | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static inline float F16ToFloat(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t rest = h & 0x7fff;
  if (rest >= 0x7c00) return BitsToFloat(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x0400) return BitsToFloat(sign | ((rest << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(rest) * 0x1p-24f;  // exact
  return BitsToFloat(sign | FloatToBits(subnormal));
}

static inline uint16_t FloatToF16(float f) {
  const uint32_t u = FloatToBits(f);
  const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000);
  const uint32_t a = u & 0x7fffffff;
  if (a > 0x7f800000) return sign | 0x7e00 | static_cast<uint16_t>(a >> 13 & 0x1ff);
  if (a >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (a < 0x38800000) {                       // below 2^-14: units of 2^-24, ties to even
    const float units = BitsToFloat(a) * 0x1p24f + 0x1p23f;
    return sign | static_cast<uint16_t>(FloatToBits(units) & 0x7fff);
  }
  return sign | static_cast<uint16_t>((a - (112u << 23) + 0xfff + (a >> 13 & 1)) >> 13);
}

template <Half H>
static inline float HalfToFloat(uint16_t h) {
  return H == Half::kF16 ? F16ToFloat(h) : BF16ToFloat(h);
}

}  // namespace flashllm
