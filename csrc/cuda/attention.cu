// Decode attention: reads the cache once, up to the slot that the new token takes.
//
//   CTA = one head of one row; a piece = the 16 bytes of a key or value that one lane holds
//
//   slot 0   [ lane 0 | lane 1 | ... | lane L - 1 ]   L lanes a slot: d of 128 in fp16 is 16
//   slot 1   [ lane L | ...                       ]   G = 256 / L slots side by side
//   slot G   again lane 0 ...                         kUnroll such rounds in flight
//
// Each group of L lanes keeps a softmax of its own over the slots it sees (running maximum, sum,
// and sum of values; Milakov and Gimelshein 2018), and all are joined at the end. The cache is a
// stream: nothing is read twice, and the slots not yet written are not read at all, which no
// program of fixed shapes can do.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "attention.h"

namespace flashllm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kUnroll = 4;  // 4 KB of keys and values a warp in flight
constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float Load(const void* p, Kind kind, int64_t i) {
  if (kind == Kind::kF16) return __half2float(static_cast<const __half*>(p)[i]);
  if (kind == Kind::kBF16) return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
  return static_cast<const float*>(p)[i];
}

__device__ __forceinline__ void Store(void* p, Kind kind, int64_t i, float v) {
  if (kind == Kind::kF16)
    static_cast<__half*>(p)[i] = __float2half_rn(v);
  else if (kind == Kind::kBF16)
    static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(v);
  else
    static_cast<float*>(p)[i] = v;
}

__device__ __forceinline__ float ToFloat(float v) { return v; }
__device__ __forceinline__ float ToFloat(__half v) { return __half2float(v); }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float ToFloat(__nv_fp8_e4m3 v) { return static_cast<float>(v); }

template <typename C>
__device__ __forceinline__ C FromFloat(float v) {
  return C(v);  // to nearest; fp8 saturates at 448, as cache.py does
}

// One lane's piece of a key or value.
template <typename C>
struct alignas(16) Piece {
  static constexpr int kSize = 16 / sizeof(C);
  C x[kSize];
};

template <typename C>
__device__ __forceinline__ Piece<C> LoadPiece(const C* p) {
  Piece<C> v;
  *reinterpret_cast<uint4*>(&v) = __ldcs(reinterpret_cast<const uint4*>(p));
  return v;
}

// Joins (m, l, acc) with that of the lanes `offset` away.
template <int kSize>
__device__ __forceinline__ void Join(int offset, float* m, float* l, float (&acc)[kSize]) {
  const float other = __shfl_xor_sync(~0u, *m, offset);
  const float top = fmaxf(*m, other);
  const float base = top == -INFINITY ? 0.0f : top;
  const float scale = exp2f(*m - base);
  // Both sides scale what they send.
  const float mine = *l * scale;
  *l = mine + __shfl_xor_sync(~0u, mine, offset);
#pragma unroll
  for (int e = 0; e < kSize; ++e) {
    const float part = acc[e] * scale;
    acc[e] = part + __shfl_xor_sync(~0u, part, offset);
  }
  *m = top;
}

template <typename C, int kLanes>
__global__ void __launch_bounds__(kThreads) AttentionKernel(Attention a) {
  using P = Piece<C>;
  constexpr int kSize = P::kSize, kGroups = kThreads / kLanes;
  __shared__ float maxima[kWarps], sums[kWarps];
  __shared__ float parts[kWarps][kLanes * kSize];

  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int64_t head = blockIdx.x, row = head / a.heads, h = head % a.heads;
  const int d = static_cast<int>(a.d), column = lane * kSize;
  const bool active = column < d;
  const int last = min(max(*a.length, 0), static_cast<int>(a.slots) - 1);  // the new token's slot
  C* const keys = static_cast<C*>(a.keys) + head * a.slots * d + column;
  C* const values = static_cast<C*>(a.values) + head * a.slots * d + column;
  const bool* const open = a.open + row * a.slots;
  const int64_t of_q = (row * 3 * a.heads + h) * d + column;
  const int64_t of_k = of_q + a.heads * d, of_v = of_k + a.heads * d;

  const float scale = rsqrtf(static_cast<float>(d)) * kLog2E;
  float q[kSize], acc[kSize];
#pragma unroll
  for (int e = 0; e < kSize; ++e) {
    q[e] = active ? Load(a.qkv, a.token, of_q + e) * scale : 0.0f;
    acc[e] = 0.0f;
  }
  float m = -INFINITY, l = 0.0f;

  for (int base = 0; base <= last; base += kGroups * kUnroll) {
    P k[kUnroll], v[kUnroll];
    bool seen[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int slot = base + u * kGroups + group;
      *reinterpret_cast<uint4*>(&k[u]) = *reinterpret_cast<uint4*>(&v[u]) = uint4{};
      seen[u] = slot <= last && open[slot];
      if (slot < last && active) {
        k[u] = LoadPiece(keys + int64_t(slot) * d);
        v[u] = LoadPiece(values + int64_t(slot) * d);
      }
      if (slot == last && active) {
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          k[u].x[e] = FromFloat<C>(Load(a.qkv, a.token, of_k + e));
          v[u].x[e] = FromFloat<C>(Load(a.qkv, a.token, of_v + e));
        }
        *reinterpret_cast<P*>(keys + int64_t(slot) * d) = k[u];
        *reinterpret_cast<P*>(values + int64_t(slot) * d) = v[u];
      }
    }
    float score[kUnroll], top = m;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float s = 0.0f;
#pragma unroll
      for (int e = 0; e < kSize; ++e) s = fmaf(q[e], ToFloat(k[u].x[e]), s);
#pragma unroll
      for (int offset = kLanes / 2; offset; offset /= 2) s += __shfl_xor_sync(~0u, s, offset);
      score[u] = seen[u] ? s : -INFINITY;
      top = fmaxf(top, score[u]);
    }
    const float reference = top == -INFINITY ? 0.0f : top;  // no slot seen yet: no NaN
    const float rescale = exp2f(m - reference);
    l *= rescale;
#pragma unroll
    for (int e = 0; e < kSize; ++e) acc[e] *= rescale;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const float p = exp2f(score[u] - reference);
      l += p;
#pragma unroll
      for (int e = 0; e < kSize; ++e) acc[e] = fmaf(p, ToFloat(v[u].x[e]), acc[e]);
    }
    m = top;
  }

  // Groups of a warp, then warps.
#pragma unroll
  for (int offset = kLanes; offset < 32; offset *= 2) Join(offset, &m, &l, acc);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 < kLanes) {
#pragma unroll
    for (int e = 0; e < kSize; ++e) parts[warp][column + e] = acc[e];
    if (lane == 0) maxima[warp] = m, sums[warp] = l;
  }
  __syncthreads();
  for (int c = threadIdx.x; c < d; c += kThreads) {
    float top = -INFINITY, sum = 0.0f, y = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, maxima[w]);
    const float reference = top == -INFINITY ? 0.0f : top;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float part = exp2f(maxima[w] - reference);
      sum += part * sums[w];
      y += part * parts[w][c];
    }
    // A row of pads alone sees nothing; 0 is as good as any finite number.
    Store(a.y, a.token, head * d + c, sum == 0.0f ? 0.0f : y / sum);
  }
}

template <typename C>
cudaError_t Run(cudaStream_t stream, const Attention& a) {
  const int pieces = static_cast<int>(a.d) / Piece<C>::kSize;
  const auto kernel = pieces <= 8    ? AttentionKernel<C, 8>
                      : pieces <= 16 ? AttentionKernel<C, 16>
                                     : AttentionKernel<C, 32>;
  kernel<<<static_cast<unsigned>(a.rows * a.heads), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

int PieceSize(Kind cache) { return cache == Kind::kF32 ? 4 : cache == Kind::kF8 ? 16 : 8; }

}  // namespace

bool SupportsAttention(const Attention& a) {
  const int size = PieceSize(a.cache);
  return a.token != Kind::kF8 && a.d > 0 && a.d % size == 0 && a.d <= 32 * size &&
         a.rows * a.heads <= INT32_MAX && a.slots > 0 && a.slots <= INT32_MAX;
}

cudaError_t DecodeAttention(cudaStream_t stream, const Attention& a) {
  switch (a.cache) {
    case Kind::kF16:
      return Run<__half>(stream, a);
    case Kind::kBF16:
      return Run<__nv_bfloat16>(stream, a);
    case Kind::kF32:
      return Run<float>(stream, a);
    default:
      return Run<__nv_fp8_e4m3>(stream, a);
  }
}

}  // namespace flashllm::cuda
