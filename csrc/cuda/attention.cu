// Decode attention: reads the cache once, up to the slot that the new token takes.
//
//   cluster = one head of one row; a piece = the 16 bytes of a key or value that one lane holds
//
//   slot 0   [ lane 0 | lane 1 | ... | lane L - 1 ]   L lanes a slot: d of 128 in fp16 is 16
//   slot 1   [ lane L | ...                       ]   G = 512 / L slots side by side, kSplit CTAs
//   slot G   again lane 0 ...                         kUnroll such rounds in flight
//
// Each group of L lanes keeps a softmax of its own over the slots it sees (running maximum, sum,
// and sum of values; Milakov and Gimelshein 2018), one of them beginning with the new token, and
// all are joined at the end, in the first CTA's shared memory. The cache is a stream: nothing is
// read twice, and the slots not yet written are not read at all, which no program of fixed shapes
// can do.
//
// In a chain the first round is read before the product of q, k and v has ended: of the cache that
// writes nothing, and what it holds was there before the chain began.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "attention.h"
#include "ptx.cuh"
#include "spmm.h"

namespace flashllm::cuda {
namespace {

constexpr int kSplit = 4;  // CTAs a head
constexpr int kThreads = 128;
constexpr int kWarps = kSplit * kThreads / 32;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr int kMaxThreads = kThreads, kCtas = 5;  // an SM; of fp8, whose pieces are longer, fewer
#else
constexpr int kMaxThreads = kSplit * kThreads, kCtas = 1;  // without clusters
#endif
constexpr int kUnroll = 4;  // 4 KB of keys and values a warp in flight
constexpr float kLog2E = 1.4426950408889634f;

// By way of L2: the kernel before wrote them while this one ran.
template <typename V, typename T, int kVectors>
__device__ __forceinline__ void LoadVectors(const T* p, const int64_t (&from)[3],
                                            V (&to)[3][kVectors]) {
#pragma unroll
  for (int i = 0; i < 3; ++i)
#pragma unroll
    for (int e = 0; e < kVectors; ++e)
      to[i][e] = __ldcg(reinterpret_cast<const V*>(p + from[i]) + e);
}

// kSize numbers of qkv from each of three places on, which kSize divides: loads that do not wait
// for each other.
template <int kSize>
__device__ __forceinline__ void Load3(const void* p, Kind kind, const int64_t (&from)[3],
                                      float (&to)[3][kSize]) {
  if (kind == Kind::kF32) {
    float4 v[3][kSize / 4];
    LoadVectors(static_cast<const float*>(p), from, v);
#pragma unroll
    for (int i = 0; i < 3; ++i)
#pragma unroll
      for (int e = 0; e < kSize / 4; ++e)
        to[i][4 * e] = v[i][e].x, to[i][4 * e + 1] = v[i][e].y, to[i][4 * e + 2] = v[i][e].z,
                  to[i][4 * e + 3] = v[i][e].w;
    return;
  }
  uint2 v[3][kSize / 4];
  LoadVectors(static_cast<const uint16_t*>(p), from, v);
#pragma unroll
  for (int i = 0; i < 3; ++i)
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const uint32_t two = e % 4 < 2 ? v[i][e / 4].x : v[i][e / 4].y;
      const uint16_t half = static_cast<uint16_t>(two >> e % 2 * 16);
      to[i][e] = kind == Kind::kF16 ? __half2float(__ushort_as_half(half))
                                    : __bfloat162float(__ushort_as_bfloat16(half));
    }
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
  return C(v);  // to nearest; fp8 saturates at 448, as attention.py's put does
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

__device__ __forceinline__ void Prefetch(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
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

// To the cluster's first CTA, by the address in this one.
__device__ __forceinline__ void StoreFirst(float4* to, [[maybe_unused]] uint32_t barrier,
                                           float4 v) {
#if __CUDA_ARCH__ >= 900
  ptx::StoreCluster128(ptx::SharedAddress(to), barrier, 0, v);
#else
  *to = v;
#endif
}

template <typename C, int kLanes>
__global__ void __launch_bounds__(kMaxThreads, sizeof(C) == 1 ? (kCtas + 1) / 2 : kCtas)
    AttentionKernel(const __grid_constant__ Attention a, int split) {
  using P = Piece<C>;
  constexpr int kSize = P::kSize;
  __shared__ float4 softmax[kWarps];  // of each warp maximum and sum
  __shared__ float4 parts[kWarps][kLanes * kSize / 4];
  __shared__ __align__(8) uint64_t arrived;  // of which only the first CTA's counts

  ptx::LaunchDependents();
  const uint32_t barrier = ptx::SharedAddress(&arrived);
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) {
    ptx::BarrierInit(barrier, 1);
    ptx::FenceBarrierInit();
    ptx::BarrierExpect(barrier, sizeof(softmax) + sizeof(parts));
  }
  __syncwarp();
  ptx::ClusterArriveRelaxed();
#endif
  constexpr int kGroups = kSplit * kThreads / kLanes, kRound = kGroups * kUnroll;
  const int rank = blockIdx.x % split, thread = rank * blockDim.x + threadIdx.x;
  const int lane = thread % kLanes, group = thread / kLanes;
  const int64_t head = blockIdx.x / split, row = head / a.heads, h = head % a.heads;
  const int d = static_cast<int>(a.d), column = lane * kSize;
  const bool active = column < d;
  const int last = min(max(*a.length, 0), static_cast<int>(a.slots) - 1);  // the new token's slot
  C* const keys = static_cast<C*>(a.keys) + head * a.slots * d + column;
  C* const values = static_cast<C*>(a.values) + head * a.slots * d + column;
  const bool* const open = a.open + row * a.slots;

  P k[kUnroll], v[kUnroll];
  bool seen[kUnroll];
  const auto read_keys = [&](int base) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int slot = base + u * kGroups + group;
      *reinterpret_cast<uint4*>(&k[u]) = uint4{};
      seen[u] = slot < last && open[slot];
      if (slot < last && active) k[u] = LoadPiece(keys + int64_t(slot) * d);
    }
  };
  const auto read_values = [&](int base) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int slot = base + u * kGroups + group;
      *reinterpret_cast<uint4*>(&v[u]) = uint4{};
      if (slot < last && active) v[u] = LoadPiece(values + int64_t(slot) * d);
    }
  };
  read_keys(0), read_values(0);
  if (active && column * sizeof(C) % 128 == 0) {  // and to L2 what comes next
#pragma unroll
    for (int u = kUnroll; u < 3 * kUnroll; ++u) {
      const int slot = u * kGroups + group;
      if (slot < last) Prefetch(keys + int64_t(slot) * d), Prefetch(values + int64_t(slot) * d);
    }
  }
  const bool newest = last % kGroups == group, newest_open = newest && open[last];
#if __CUDA_ARCH__ >= 900
  ptx::ClusterWait();  // all CTAs run, and may be written to
#endif
  ptx::WaitForPrevious();

  // The new token first: its group begins with it, all others with nothing.
  const float scale = rsqrtf(static_cast<float>(d)) * kLog2E;
  const int64_t of_q = (row * 3 * a.heads + h) * d + column, apart = a.heads * d;
  float qkv[3][kSize] = {};
  if (active) Load3(a.qkv, a.token, {of_q, of_q + apart, of_q + 2 * apart}, qkv);
  P new_k, new_v;
  float q[kSize], acc[kSize], m = 0.0f;
#pragma unroll
  for (int e = 0; e < kSize; ++e) {
    q[e] = qkv[0][e] * scale;
    new_k.x[e] = FromFloat<C>(qkv[1][e]), new_v.x[e] = FromFloat<C>(qkv[2][e]);
    m = fmaf(q[e], ToFloat(new_k.x[e]), m);
    acc[e] = newest_open ? ToFloat(new_v.x[e]) : 0.0f;
  }
  if (newest && active) {
    *reinterpret_cast<P*>(keys + int64_t(last) * d) = new_k;
    *reinterpret_cast<P*>(values + int64_t(last) * d) = new_v;
  }
#pragma unroll
  for (int offset = kLanes / 2; offset; offset /= 2) m += __shfl_xor_sync(~0u, m, offset);
  float l = newest_open ? 1.0f : 0.0f;
  m = newest_open ? m : -INFINITY;

  for (int base = 0; base < last; base += kRound) {
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
    read_keys(base + kRound);
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
    read_values(base + kRound);
  }

  // Groups of a warp, then warps of all CTAs in the first one's shared memory.
#pragma unroll
  for (int offset = kLanes; offset < 32; offset *= 2) Join(offset, &m, &l, acc);
  const int warp = thread / 32;
  if (threadIdx.x % 32 < kLanes) {
#pragma unroll
    for (int e = 0; e < kSize; e += 4)
      StoreFirst(&parts[warp][(column + e) / 4], barrier,
                 make_float4(acc[e], acc[e + 1], acc[e + 2], acc[e + 3]));
    if (lane == 0) StoreFirst(&softmax[warp], barrier, make_float4(m, l, 0.0f, 0.0f));
  }
  if (rank) return;
#if __CUDA_ARCH__ >= 900
  ptx::BarrierWait(barrier, 0);
#else
  __syncthreads();
#endif
  for (int c = threadIdx.x; c < d; c += blockDim.x) {
    float top = -INFINITY, sum = 0.0f, y = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, softmax[w].x);
    const float reference = top == -INFINITY ? 0.0f : top;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float part = exp2f(softmax[w].x - reference);
      sum += part * softmax[w].y;
      y += part * reinterpret_cast<const float*>(parts[w])[c];
    }
    // A row of pads alone sees nothing; 0 is as good as any finite number.
    Store(a.y, a.token, head * d + c, sum == 0.0f ? 0.0f : y / sum);
  }
}

template <typename C>
cudaError_t Run(cudaStream_t stream, const Attention& a, bool overlap, bool follows) {
  const int pieces = static_cast<int>(a.d) / Piece<C>::kSize;
  const auto kernel = pieces <= 8    ? AttentionKernel<C, 8>
                      : pieces <= 16 ? AttentionKernel<C, 16>
                                     : AttentionKernel<C, 32>;
  // Code that overlaps knows clusters too.
  const int split = overlap ? kSplit : 1, threads = kSplit * kThreads / split;
  const dim3 grid(static_cast<unsigned>(a.rows * a.heads * split));
  return LaunchClusters(stream, split, kernel, grid, threads, 0, overlap && follows, a, split);
}

int PieceSize(Kind cache) { return cache == Kind::kF32 ? 4 : cache == Kind::kF8 ? 16 : 8; }

}  // namespace

bool SupportsAttention(const Attention& a) {
  const int size = PieceSize(a.cache);
  return a.token != Kind::kF8 && a.d > 0 && a.d % size == 0 && a.d <= 32 * size &&
         a.rows * a.heads <= INT32_MAX / kSplit && a.slots > 0 && a.slots <= INT32_MAX;
}

cudaError_t DecodeAttention(cudaStream_t stream, const Attention& a, bool overlap, bool follows) {
  switch (a.cache) {
    case Kind::kF16:
      return Run<__half>(stream, a, overlap, follows);
    case Kind::kBF16:
      return Run<__nv_bfloat16>(stream, a, overlap, follows);
    case Kind::kF32:
      return Run<float>(stream, a, overlap, follows);
    default:
      return Run<__nv_fp8_e4m3>(stream, a, overlap, follows);
  }
}

}  // namespace flashllm::cuda
