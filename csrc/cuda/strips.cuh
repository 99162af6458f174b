// Strips, accumulators and the epilogue: what the main loops share.
#pragma once
#include "ptx.cuh"
#include "spmm.h"

namespace flashllm::cuda {

// ---- who works on what ----

// First unit of CTA c: shares of `share` units, and one more each for the first ones.
__host__ __device__ inline int FirstUnit(const Args& a, int c) {
  return c * a.share + min(c, a.longer);
}

// The CTA that has unit u.
__host__ __device__ inline int CtaOf(const Args& a, int u) {
  const int c = u / (a.share + 1);
  return c < a.longer ? c : a.longer + (u - a.longer * (a.share + 1)) / a.share;
}

// Sixteen rows of W: row0.. of y, of which `valid` exist.
struct Band {
  int64_t row0;
  int valid;
};

__device__ inline Band BandOf(const Args& a, int index) {
  if (index >= a.bands) return {0, 0};
  const int shard = index / a.shard_bands, band = index % a.shard_bands;
  return {int64_t(shard) * a.shard_rows + band * 16, min(16, a.shard_rows - band * 16)};
}

// `band` counts in its strip.
__device__ inline int64_t PartialIndex(const Args& a, int group, int cta, int slot, int band,
                                       int n8) {
  int64_t i = int64_t(group) * a.ctas + cta;
  i = i * a.slots + slot;
  i = i * a.warps + band;
  i = i * (a.group / 8) + n8;
  return i * 32;  // float4s
}

// ---- stages ----

// Lane 0 frees a stage for its warp, after a __syncwarp. racecheck counts what the threads that
// arrive have read, not what they know of others: in a build for it all lanes arrive.
#ifdef FLASHLLM_RACECHECK
constexpr int kArrivals = 32;
#else
constexpr int kArrivals = 1;
#endif

__device__ __forceinline__ bool Frees(int lane) { return kArrivals == 32 || lane == 0; }

// ---- epilogue ----

// A number's bits, and the number. Apart where nobody shall wait for the load yet.
__device__ inline uint32_t LoadRaw(const void* p, Type type, int64_t i) {
  if (type == Type::kF32) return static_cast<const uint32_t*>(p)[i];
  return static_cast<const uint16_t*>(p)[i];
}

__device__ inline float FloatOf(uint32_t bits, Type type) {
  if (type == Type::kF32) return __uint_as_float(bits);
  // One load for both: where each type has its own branch, loads wait for each other.
  const uint16_t v = static_cast<uint16_t>(bits);
  const float bf16 = __bfloat162float(__ushort_as_bfloat16(v));
  return type == Type::kBF16 ? bf16 : __half2float(__ushort_as_half(v));
}

__device__ inline float LoadFloat(const void* p, Type type, int64_t i) {
  return FloatOf(LoadRaw(p, type, i), type);
}

__device__ inline float Gelu(float v) { return 0.5f * v * erfcf(-0.70710678118654752f * v); }

// act(sum + bias of its row)
__device__ inline float Activated(const Output& out, float bias, float sum) {
  if (out.bias) sum += bias;
  if (out.activation == 1) sum = sum < 0.0f ? 0.0f : sum;  // keeps NaN
  if (out.activation == 2) sum = Gelu(sum);
  return sum;
}

// act(sum + bias of its row) + residual, rounded to y's type. i: row + token * rows.
__device__ inline void Store(const Output& out, int64_t i, float bias, float residual, float sum) {
  sum = Activated(out, bias, sum);
  if (out.residual) sum += residual;
  switch (out.type) {
    case Type::kF16:
      static_cast<__half*>(out.y)[i] = __float2half_rn(sum);
      break;
    case Type::kBF16:
      static_cast<__nv_bfloat16*>(out.y)[i] = __float2bfloat16_rn(sum);
      break;
    default:
      static_cast<float*>(out.y)[i] = sum;
  }
}

__device__ inline float LoadBias(const Output& out, int64_t row) {
  return out.bias ? LoadFloat(out.bias, out.bias_type, row) : 0.0f;
}

__device__ inline float LoadResidual(const Output& out, int64_t i) {
  return out.residual ? LoadFloat(out.residual, out.type, i) : 0.0f;
}

// What the 16 x 8 sums of one warp have added, as mma leaves them: rows g, g + 8, tokens 2 t,
// 2 t + 1.
struct Addends {
  float bias[2], residual[4];
};

__device__ inline Addends LoadAddends(const Args& a, const Band& band, int token0, int lane) {
  const int g = lane >> 2, token = token0 + (lane & 3) * 2;
  Addends to = {};
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    if (g + upper * 8 >= band.valid) break;
    const int64_t row = band.row0 + g + upper * 8, i = token * a.out.rows + row;
    to.bias[upper] = LoadBias(a.out, row);
    if (token < a.tokens) to.residual[upper * 2] = LoadResidual(a.out, i);
    if (token + 1 < a.tokens) to.residual[upper * 2 + 1] = LoadResidual(a.out, i + a.out.rows);
  }
  return to;
}

__device__ inline void StoreFragment(const Args& a, const Band& band, int token0, int lane,
                                     float4 c) {
  const Addends add = LoadAddends(a, band, token0, lane);
  const int g = lane >> 2, token = token0 + (lane & 3) * 2;
  const float sums[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    if (g + upper * 8 >= band.valid) break;
    const int64_t row = band.row0 + g + upper * 8, i = token * a.out.rows + row;
    const int r = upper * 2;
    if (token < a.tokens) Store(a.out, i, add.bias[upper], add.residual[r], sums[r]);
    if (token + 1 < a.tokens)
      Store(a.out, i + a.out.rows, add.bias[upper], add.residual[r + 1], sums[r + 1]);
  }
}

// Of a warp's buffer for StoreSums.
constexpr uint32_t kTokenBytes = 80, kBufferBytes = 8 * kTokenBytes;

// A warp's sums go to y eight tokens at a time, by way of shared memory: [token][row] floats, rows
// of tokens 80 bytes apart, so that stores have no bank conflicts. Four lanes take a token's rows.
template <int kN8>
__device__ __forceinline__ void StoreSums(const Args& a, const Band& band, int token0, int lane,
                                          uint32_t buffer, const float (&acc)[kN8][4]) {
  const int g = lane >> 2, t = lane & 3;
  const float bias[2] = {g < band.valid ? LoadBias(a.out, band.row0 + g) : 0.0f,
                         g + 8 < band.valid ? LoadBias(a.out, band.row0 + g + 8) : 0.0f};
  const uint32_t put = buffer + 2 * t * kTokenBytes + g * 4;
  const uint32_t get = buffer + g * kTokenBytes + t * 16;
  const int rows = min(4, band.valid - t * 4);  // of this lane
  uint16_t* y = static_cast<uint16_t*>(a.out.y) + (token0 + g) * a.out.rows + band.row0 + t * 4;
  const bool vectors = a.out.rows % 4 == 0 && band.row0 % 4 == 0 && rows == 4 &&
                       reinterpret_cast<uintptr_t>(a.out.y) % 8 == 0;
  const bool bf16 = a.out.type == Type::kBF16;
  const auto half_of = [&](uint32_t bits) -> uint32_t {
    const float v = __uint_as_float(bits);
    return bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(v))
                : __half_as_ushort(__float2half_rn(v));
  };
#pragma unroll
  for (int n8 = 0; n8 < kN8; ++n8) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float v = acc[n8][i] + bias[i / 2];
      if (a.out.activation == 1) v = v < 0.0f ? 0.0f : v;  // keeps NaN
      ptx::StoreShared32(put + i % 2 * kTokenBytes + i / 2 * 32, __float_as_uint(v));
    }
    __syncwarp();
    if (a.out.activation == 2) {
#pragma unroll 1
      for (int i = 0; i < 16; i += 4) {
        const float v = __uint_as_float(ptx::LoadShared32(get + i));
        ptx::StoreShared32(get + i, __float_as_uint(Gelu(v)));
      }
    }
    if (token0 + n8 * 8 + g < a.tokens) {
      if (vectors) {
        const uint4 v = ptx::LoadShared128(get);
        *reinterpret_cast<uint2*>(y) =
            make_uint2(half_of(v.x) | half_of(v.y) << 16, half_of(v.z) | half_of(v.w) << 16);
      } else {
#pragma unroll 1
        for (int i = 0; i < rows; ++i)
          y[i] = static_cast<uint16_t>(half_of(ptx::LoadShared32(get + i * 4)));
      }
    }
    y += 8 * a.out.rows;
  }
}

// Ends a segment, the part of a strip that a CTA has: from `begin` on, to its end if `ends`.
// A whole strip goes to y, parts to `partial`, where a kernel of its own adds them up (tokens.cu):
// a CTA shares its first strip with those before it (slot 0), its last with those behind (slot 1).
template <int kN8>
__device__ inline void Flush(const Args& a, int cta, int group, int strip, int ordinal, int begin,
                             bool ends, int warp, int lane, float (&acc)[kN8][4]) {
  const bool whole = begin == 0 && ends && !a.keep_all;
  const int slot = a.keep_all ? min(ordinal, a.slots - 1) : begin == 0;
  float4* const to =
      reinterpret_cast<float4*>(a.partial) + lane + PartialIndex(a, group, cta, slot, warp, 0);
  const Band band = BandOf(a, strip * a.warps + warp);
#pragma unroll
  for (int n8 = 0; n8 < kN8; ++n8) {
    const float4 sum = make_float4(acc[n8][0], acc[n8][1], acc[n8][2], acc[n8][3]);
    acc[n8][0] = acc[n8][1] = acc[n8][2] = acc[n8][3] = 0.0f;
    if (whole)
      StoreFragment(a, band, (group * kN8 + n8) * 8, lane, sum);
    else
      to[n8 * 32] = sum;
  }
}

}  // namespace flashllm::cuda
