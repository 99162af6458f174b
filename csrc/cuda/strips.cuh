// Strips, accumulators and the epilogue: what the main loops share.
#pragma once
#include "ptx.cuh"
#include "spmm.h"

namespace flashllm::cuda {

// ---- who works on what ----

// First unit of CTA c.
__host__ __device__ inline int64_t FirstUnit(const Args& a, int64_t c) {
  return c * a.units / a.ctas;
}

// The CTA that has unit u: the last c with FirstUnit(c) <= u.
__host__ __device__ inline int CtaOf(const Args& a, int64_t u) {
  return static_cast<int>(((u + 1) * a.ctas - 1) / a.units);
}

// Rows of W of one warp: row0.. of y, of which `valid` exist.
struct Band {
  int64_t row0;
  int valid;
};

__device__ inline Band BandOf(const Args& a, int index) {
  if (index >= a.bands) return {0, 0};
  const int shard = index / a.shard_bands, band = index % a.shard_bands;
  return {int64_t(shard) * a.shard_rows + band * 16, min(16, a.shard_rows - band * 16)};
}

__device__ inline int64_t PartialIndex(const Args& a, int group, int cta, int slot, int warp,
                                       int n8) {
  int64_t i = int64_t(group) * a.ctas + cta;
  i = i * a.slots + slot;
  i = i * a.warps + warp;
  i = i * (a.group / 8) + n8;
  return i * 32;  // float4s
}

// ---- epilogue ----

__device__ inline float LoadFloat(const void* p, Type type, int64_t i) {
  switch (type) {
    case Type::kF16:
      return __half2float(static_cast<const __half*>(p)[i]);
    case Type::kBF16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
    default:
      return static_cast<const float*>(p)[i];
  }
}

// act(sum + bias), rounded to y's type.
__device__ inline void Store(const Output& out, int64_t token, int64_t row, float sum) {
  if (out.bias) sum += LoadFloat(out.bias, out.bias_type, row);
  if (out.activation == 1) sum = sum < 0.0f ? 0.0f : sum;  // keeps NaN
  if (out.activation == 2) sum = 0.5f * sum * erfcf(-0.70710678118654752f * sum);
  const int64_t i = token * out.rows + row;
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

// The 16 x 8 sums of one warp, as mma leaves them: rows g, g + 8, tokens 2 t, 2 t + 1.
__device__ inline void StoreFragment(const Args& a, const Band& band, int token0, int lane,
                                     float4 c) {
  const int g = lane >> 2, t = lane & 3;
  const float sums[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = g + (i >> 1) * 8, token = token0 + 2 * t + (i & 1);
    if (row < band.valid && token < a.tokens) Store(a.out, token, band.row0 + row, sums[i]);
  }
}

// Ends a strip: the sums go to y if this CTA has seen all of K, else to `partial`.
template <int kN8>
__device__ inline void Flush(const Args& a, int group, int strip, int ordinal, bool whole, int warp,
                             int lane, float (&acc)[kN8][4]) {
  const Band band = BandOf(a, strip * a.warps + warp);
#pragma unroll
  for (int n8 = 0; n8 < kN8; ++n8) {
    const float4 c = make_float4(acc[n8][0], acc[n8][1], acc[n8][2], acc[n8][3]);
    if (whole && !a.keep_all) {
      StoreFragment(a, band, (group * kN8 + n8) * 8, lane, c);
    } else {
      const int slot = min(ordinal, a.slots - 1);
      reinterpret_cast<float4*>(
          a.partial)[PartialIndex(a, group, blockIdx.x, slot, warp, n8) + lane] = c;
    }
    acc[n8][0] = acc[n8][1] = acc[n8][2] = acc[n8][3] = 0.0f;
  }
}

}  // namespace flashllm::cuda
