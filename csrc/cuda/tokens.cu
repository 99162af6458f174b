// Before and after the main loop: x into terms of W's type, and sums of partial products.
#include "strips.cuh"

namespace flashllm::cuda {
namespace {

constexpr int kThreads = 256, kCombineBands = 4, kCombineThreads = kCombineBands * 32;
// From 64 tokens on a warp sums 32 of them where there would be more CTAs than run at a time.
constexpr int kCombineN8 = 4, kCombineCtas = 2048;

__device__ inline uint16_t ToHalf(float v, bool bf16) {
  return bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(v)) : __half_as_ushort(__float2half_rn(v));
}

__device__ inline float ToFloat(uint16_t v, bool bf16) {
  return bf16 ? __bfloat162float(__ushort_as_bfloat16(v)) : __half2float(__ushort_as_half(v));
}

// One CTA a token: x[token] = (term 0 + 2^-s term 1 + 2^-2s term 2) * unscale, s = 11 for fp16
// and 0 for bf16; columns from K to k_padded are zero. Inf and NaN stay whole in term 0.
__global__ void __launch_bounds__(kThreads)
    PrepareKernel(const void* x, Type type, bool bf16, int64_t n, int64_t k, int64_t k_padded,
                  int terms, uint16_t* out, float* unscale) {
  ptx::LaunchDependents();
  const int64_t token = blockIdx.x;
  float scale = 1.0f;
  if (terms > 1 && !bf16) {
    __shared__ uint32_t warp_max[kThreads / 32];
    uint32_t largest = 0;  // of the finite magnitudes; bits of floats order like floats
    for (int64_t c = threadIdx.x; c < k; c += kThreads) {
      const uint32_t bits = __float_as_uint(LoadFloat(x, type, token * k + c)) & 0x7fffffffu;
      if (bits < 0x7f800000u) largest = max(largest, bits);
    }
    largest = __reduce_max_sync(~0u, largest);
    if (threadIdx.x % 32 == 0) warp_max[threadIdx.x / 32] = largest;
    __syncthreads();
    for (int w = 0; w < kThreads / 32; ++w) largest = max(largest, warp_max[w]);
    // The largest magnitude goes to [2^14, 2^15): exponent field e to 127 + 14.
    const int shift = largest ? min(126, 127 + 14 - static_cast<int>(largest >> 23)) : 0;
    scale = __uint_as_float(static_cast<uint32_t>(127 + shift) << 23);
    if (threadIdx.x == 0)
      unscale[token] = __uint_as_float(static_cast<uint32_t>(127 - shift) << 23);
  } else if (terms > 1 && threadIdx.x == 0) {
    unscale[token] = 1.0f;
  }
  const float step = bf16 ? 1.0f : 2048.0f;
  for (int64_t c = threadIdx.x; c < k_padded; c += kThreads) {
    float rest = c < k ? LoadFloat(x, type, token * k + c) * scale : 0.0f;
    for (int term = 0; term < terms; ++term) {
      uint16_t half = ToHalf(rest, bf16);
      float held = ToFloat(half, bf16);
      // A finite float above bf16's largest: round towards zero instead.
      if (isinf(held) && !isinf(rest)) {
        half = static_cast<uint16_t>(half - 1);
        held = ToFloat(half, bf16);
      }
      out[(term * n + token) * k_padded + c] = half;
      rest = isfinite(held) ? (rest - held) * step : 0.0f;
    }
  }
}

// One thread 16 bytes of the image. Its chunk c of a token holds, as mma's order of k wants it,
// columns 16 t + 2 c and the next for t = 0..3 (bitmap.h).
__global__ void __launch_bounds__(kThreads)
    PrepareWideKernel(const uint16_t* x, int64_t n, int64_t k, uint16_t* out, int group,
                      int64_t tiles, int64_t chunks) {
  ptx::LaunchDependents();
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= chunks) return;
  const int64_t row = i / 8, tile = row / group % tiles;
  const int in_group = static_cast<int>(row % group);
  const int64_t token = row / group / tiles * group + in_group;
  const int64_t col = tile * 64 + ((i ^ in_group) & 7) * 2;
  uint32_t words[4] = {};
  if (token < n) {
    const uint16_t* from = x + token * k + col;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      if (k % 2 == 0 && col + 16 * t < k) {
        words[t] = *reinterpret_cast<const uint32_t*>(from + 16 * t);
      } else {
        if (col + 16 * t < k) words[t] = from[16 * t];
        if (col + 16 * t + 1 < k) words[t] |= static_cast<uint32_t>(from[16 * t + 1]) << 16;
      }
    }
  }
  reinterpret_cast<uint4*>(out)[i] = make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ inline bool AlignedTo8(const void* p) { return reinterpret_cast<uintptr_t>(p) % 8 == 0; }

// Of a 16-bit residual up to four rows, and Store4, which is Store for them.
__device__ inline uint2 LoadResidual4(const Output& out, int64_t i, int rows) {
  if (!out.residual) return {};
  const uint16_t* const from = static_cast<const uint16_t*>(out.residual) + i;
  if (rows == 4 && AlignedTo8(from)) return *reinterpret_cast<const uint2*>(from);
  uint32_t halves[4] = {};
#pragma unroll
  for (int r = 0; r < 4; ++r)
    if (r < rows) halves[r] = from[r];
  return make_uint2(halves[0] | halves[1] << 16, halves[2] | halves[3] << 16);
}

__device__ inline void Store4(const Output& out, int64_t i, int rows, const float (&bias)[4],
                              uint2 residual, float4 sum) {
  const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
  uint16_t* const y = static_cast<uint16_t*>(out.y) + i;
  const bool bf16 = out.type == Type::kBF16;
  uint16_t halves[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    float v = Activated(out, bias[r], sums[r]);
    const uint32_t two = r < 2 ? residual.x : residual.y;
    if (out.residual) v += ToFloat(static_cast<uint16_t>(two >> r % 2 * 16), bf16);
    halves[r] = ToHalf(v, bf16);
  }
  if (rows == 4 && AlignedTo8(y)) {
    *reinterpret_cast<uint2*>(y) =
        make_uint2(halves[0] | halves[1] << 16, halves[2] | halves[3] << 16);
  } else {
#pragma unroll
    for (int r = 0; r < 4; ++r)
      if (r < rows) y[r] = halves[r];
  }
}

// Sums of the strips that several CTAs share, in order of K: one warp 16 rows x 8 tokens, kN8
// times. By way of shared memory y is then written in pieces of 128 bytes, the rows of a CTA's four
// warps. Small CTAs, that find room beside the main loop's last ones and have all but the sums when
// those end.
template <int kN8>
__global__ void __launch_bounds__(kCombineThreads) CombineKernel(const __grid_constant__ Args a) {
  constexpr int kAtATime = 8 / kN8;
  constexpr int kTokenFloats = kCombineBands * 16 + 4;  // no bank conflicts
  __shared__ __align__(16) float sums[kN8][8][kTokenFloats];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, strip = blockIdx.x;
  const int group = blockIdx.z, group_of_tokens = group + strip % a.strip_groups;
  const int ctas_of_band = a.group / 8 / kN8, n8 = blockIdx.y % ctas_of_band * kN8;
  const int strip_band0 = blockIdx.y / ctas_of_band * kCombineBands;
  const int first = CtaOf(a, strip * a.blocks), last = CtaOf(a, (strip + 1) * a.blocks - 1);
  const int64_t stride = PartialIndex(a, 0, 1, 0, 0, 0);
  const float4* from = reinterpret_cast<const float4*>(a.partial) + lane +
                       PartialIndex(a, group, first + 1, 0, strip_band0 + warp, n8);
  const float4* own = from + PartialIndex(a, 0, 0, 1, 0, 0) - stride;
  // Of y: four rows of one of eight tokens.
  const int piece = threadIdx.x % (kCombineBands * 4), in_eight = threadIdx.x / (kCombineBands * 4);
  const int out_band = strip_band0 + piece / 4;
  const Band band = BandOf(a, strip / a.strip_groups * a.warps + out_band);
  const int rows = out_band < a.warps ? min(4, band.valid - piece % 4 * 4) : 0;
  const int64_t row = band.row0 + piece % 4 * 4;
  ptx::LaunchDependents();
  // A bias comes from memory, past whatever weights went through L2 since.
  float bias[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) bias[r] = r < rows && first != last ? LoadBias(a.out, row + r) : 0.0f;
  // All warps wait: a grid that ended before its predecessor would set the next one free.
  ptx::WaitForPrevious();
  if (first == last) return;
  uint2 residual[kN8];
  const int64_t token0 = int64_t(group_of_tokens * (a.group / 8) + n8) * 8 + in_eight;
#pragma unroll
  for (int j = 0; j < kN8; ++j)
    if (rows > 0 && token0 + j * 8 < a.tokens)
      residual[j] = LoadResidual4(a.out, (token0 + j * 8) * a.out.rows + row, rows);
  if (strip_band0 + warp < a.warps) {
    float4 sum[kN8];
#pragma unroll
    for (int j = 0; j < kN8; ++j) sum[j] = __ldcg(own + j * 32);
    for (int c = first + 1; c <= last; c += kAtATime, from += kAtATime * stride) {
      float4 p[kAtATime][kN8];
#pragma unroll
      for (int i = 0; i < kAtATime; ++i) {
#pragma unroll
        for (int j = 0; j < kN8; ++j)
          if (c + i <= last) p[i][j] = __ldcg(from + i * stride + j * 32);
      }
#pragma unroll
      for (int i = 0; i < kAtATime; ++i) {
#pragma unroll
        for (int j = 0; j < kN8; ++j)
          if (c + i <= last)
            sum[j].x += p[i][j].x, sum[j].y += p[i][j].y, sum[j].z += p[i][j].z,
                sum[j].w += p[i][j].w;
      }
    }
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int j = 0; j < kN8; ++j) {
      float* const to = &sums[j][2 * t][warp * 16 + g];
      to[0] = sum[j].x, to[kTokenFloats] = sum[j].y;
      to[8] = sum[j].z, to[kTokenFloats + 8] = sum[j].w;
    }
  }
  __syncthreads();
  if (rows > 0) {
#pragma unroll
    for (int j = 0; j < kN8; ++j) {
      const int64_t token = token0 + j * 8;
      if (token >= a.tokens) break;
      const float4 sum = *reinterpret_cast<const float4*>(&sums[j][in_eight][piece * 4]);
      Store4(a.out, token * a.out.rows + row, rows, bias, residual[j], sum);
    }
  }
}

// ---- LayerNorm ----

constexpr int kNormSplit = 8, kNormThreads = 128;  // CTAs of a cluster, which share a token
constexpr int kNormKept = 2;                       // 16-byte pieces a thread
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr int kNormMaxThreads = kNormThreads;
#else
constexpr int kNormMaxThreads = kNormSplit * kNormThreads;  // without clusters
#endif

// Numbers i to i + 7, or all `absent` where there are none: loads that do not wait for each other.
__device__ inline void LoadEight(const void* p, Type type, int64_t i, float absent,
                                 float (&to)[8]) {
  if (!p || type == Type::kF32) {
#pragma unroll
    for (int j = 0; j < 8; ++j) to[j] = p ? static_cast<const float*>(p)[i + j] : absent;
    return;
  }
  const uint4 v = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p) + i);
  const uint32_t* const words = reinterpret_cast<const uint32_t*>(&v);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const uint16_t half = static_cast<uint16_t>(words[j / 2] >> j % 2 * 16);
    to[j] = ToFloat(half, type == Type::kBF16);
  }
}

// The sum over the CTA's threads, in a fixed order.
__device__ float SumOverCta(float v) {
  __shared__ float warps[32];
#pragma unroll
  for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  v = warps[0];
  for (int w = 1; w < blockDim.x / 32; ++w) v += warps[w];
  return v;
}

// y = (h - mean) / sqrt(variance + epsilon) * scale + shift; a cluster a token. Each CTA has the
// mean of its part and the squares about that; those of all parts are joined as Chan, Golub and
// LeVeque do.
template <bool kBf16>
__global__ void __launch_bounds__(kNormMaxThreads) NormKernel(const __grid_constant__ Norm a) {
  const int pieces = static_cast<int>(a.width / 8), threads = gridDim.x * blockDim.x;
  const int64_t at = blockIdx.y * a.width;
  const uint4* const from = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(a.h) + at);
  ptx::LaunchDependents();
  uint4 kept[kNormKept];
  auto each = [&](auto f) {
#pragma unroll
    for (int j = 0; j < kNormKept; ++j) {
      const int piece = j * threads + blockIdx.x * blockDim.x + threadIdx.x;
      if (piece < pieces) f(j, piece, kept[j]);
    }
  };
  auto numbers = [&](uint4& v, auto f) {
    uint32_t* const words = reinterpret_cast<uint32_t*>(&v);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      f(i, ToFloat(static_cast<uint16_t>(words[i / 2] >> i % 2 * 16), kBf16));
  };
  // These come from memory, past whatever weights went through L2 since.
  float by[kNormKept][8], add[kNormKept][8];
  int count = 0;
  each([&](int j, int piece, uint4&) {
    count += 8;
    LoadEight(a.scale, a.scale_type, int64_t(piece) * 8, 1.0f, by[j]);
    LoadEight(a.shift, a.shift_type, int64_t(piece) * 8, 0.0f, add[j]);
  });
  const float all = SumOverCta(static_cast<float>(count));
#if __CUDA_ARCH__ >= 900
  __shared__ __align__(8) uint64_t arrived;
  __shared__ float4 parts[kNormSplit];
  const uint32_t barrier = ptx::SharedAddress(&arrived);
  if (threadIdx.x == 0) {
    ptx::BarrierInit(barrier, 1);
    ptx::FenceBarrierInit();
    ptx::BarrierExpect(barrier, sizeof(parts));
  }
  __syncwarp();
  ptx::ClusterArriveRelaxed(), ptx::ClusterWait();  // all CTAs run, and may be written to
#endif
  ptx::WaitForPrevious();
  each([&](int, int piece, uint4& v) { v = __ldcg(from + piece); });
  float sum = 0.0f;
  each([&](int, int, uint4& v) { numbers(v, [&](int, float x) { sum += x; }); });
  float mean = SumOverCta(sum) / fmaxf(all, 1.0f), squares = 0.0f;
  each([&](int, int, uint4& v) {
    numbers(v, [&](int, float x) { squares += (x - mean) * (x - mean); });
  });
  squares = SumOverCta(squares);
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x < kNormSplit)
    ptx::StoreCluster128(ptx::SharedAddress(&parts[blockIdx.x]), barrier, threadIdx.x,
                         make_float4(all, mean, squares, 0.0f));
  ptx::BarrierWait(barrier, 0);
  float total = 0.0f;
#pragma unroll
  for (int c = 0; c < kNormSplit; ++c) total += parts[c].x * parts[c].y;
  mean = total / static_cast<float>(a.width);
  squares = 0.0f;
#pragma unroll
  for (int c = 0; c < kNormSplit; ++c) {
    const float off = parts[c].y - mean;
    squares += parts[c].z + parts[c].x * off * off;
  }
#endif
  const float scale = 1.0f / sqrtf(squares / static_cast<float>(a.width) + a.epsilon);
  each([&](int j, int piece, uint4& v) {
    uint32_t halves[8];
    numbers(v, [&](int i, float x) {
      halves[i] = ToHalf((x - mean) * scale * by[j][i] + add[j][i], kBf16);
    });
    reinterpret_cast<uint4*>(static_cast<uint16_t*>(a.y) + at)[piece] =
        make_uint4(halves[0] | halves[1] << 16, halves[2] | halves[3] << 16,
                   halves[4] | halves[5] << 16, halves[6] | halves[7] << 16);
  });
}

// Sums of tokens in terms over the CTAs that share a strip, in order of K: one thread an element
// of y.
__global__ void __launch_bounds__(kThreads) CombineTermsKernel(const __grid_constant__ Args a) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  // All threads wait: a grid that ended before its predecessor would set the next one free.
  ptx::WaitForPrevious();
  const int strip_rows = a.warps * 16;
  const int64_t padded_rows = int64_t(a.strips) * strip_rows;
  const int64_t token = index / padded_rows;
  if (token >= a.tokens_a_term) return;
  const int row = static_cast<int>(index % padded_rows);
  const int strip = row / strip_rows, strip_band = row % strip_rows / 16;
  const Band band = BandOf(a, row / 16);
  if (row % 16 >= band.valid) return;
  const int first = CtaOf(a, strip * a.blocks), last = CtaOf(a, (strip + 1) * a.blocks - 1);
  const float unscale = a.unscale[token];
  float total = 0.0f, weight = 1.0f;
  for (int term = 0; term < a.terms; ++term, weight *= a.term_step) {
    const int col = static_cast<int>(term * a.tokens_a_term + token);
    const int group = col / a.group, n8 = col % a.group / 8;
    const int at_lane = (row % 8) * 4 + col % 8 / 2, reg = row % 16 / 8 * 2 + col % 2;
    float sum = 0.0f;
    for (int c = first; c <= last; ++c) {
      const int ordinal = strip - static_cast<int>(FirstUnit(a, c) / a.blocks);
      const int64_t at =
          PartialIndex(a, group, c, min(ordinal, a.slots - 1), strip_band, n8) + at_lane;
      sum += a.partial[at * 4 + reg];
    }
    // Inf in W meets the zeros of the smaller terms: what term 0 says then stands.
    if (term == 0) {
      total = sum;
      if (!isfinite(sum)) break;
    } else {
      total += sum * weight;
    }
  }
  const int64_t y_row = band.row0 + row % 16;
  const int64_t i = token * a.out.rows + y_row;
  Store(a.out, i, LoadBias(a.out, y_row), LoadResidual(a.out, i), total * unscale);
}

}  // namespace

cudaError_t PrepareTokens(cudaStream_t stream, const void* x, Type token, Type weight, int64_t n,
                          int64_t k, int64_t k_padded, int terms, uint16_t* out, float* unscale) {
  PrepareKernel<<<static_cast<unsigned>(n), kThreads, 0, stream>>>(
      x, token, weight == Type::kBF16, n, k, k_padded, terms, out, unscale);
  return cudaGetLastError();
}

cudaError_t PrepareWide(cudaStream_t stream, const uint16_t* x, int64_t n, int64_t k, uint16_t* out,
                        const Args& a) {
  const int64_t tiles = int64_t(a.blocks) * 4, chunks = a.strip_groups * a.group * tiles * 8;
  PrepareWideKernel<<<static_cast<unsigned>(CeilDiv(chunks, kThreads)), kThreads, 0, stream>>>(
      x, n, k, out, a.group, tiles, chunks);
  return cudaGetLastError();
}

cudaError_t Combine(cudaStream_t stream, const Args& a, bool overlap) {
  const int n8s = a.group / 8;
  const int64_t quads = CeilDiv(a.warps, kCombineBands);
  const bool many = n8s >= 8 && a.strips * quads * n8s * a.groups > kCombineCtas;
  const auto kernel = many ? CombineKernel<kCombineN8> : CombineKernel<1>;
  const dim3 grid(a.strips, static_cast<unsigned>(quads * n8s / (many ? kCombineN8 : 1)), a.groups);
  return Launch(stream, kernel, grid, kCombineThreads, 0, overlap, a);
}

cudaError_t LayerNorm(cudaStream_t stream, const Norm& a, bool overlap) {
  // Code that overlaps knows clusters too. Small CTAs find room beside a product's.
  const int split = overlap ? kNormSplit : 1, threads = kNormSplit * kNormThreads / split;
  if (a.width % 8 || a.width > int64_t(split) * threads * kNormKept * 8)
    return cudaErrorInvalidValue;
  const auto kernel = a.type == Type::kBF16 ? NormKernel<true> : NormKernel<false>;
  const dim3 grid(split, static_cast<unsigned>(a.tokens));
  return LaunchClusters(stream, split, kernel, grid, threads, 0, overlap, a);
}

cudaError_t CombineTerms(cudaStream_t stream, const Args& a, bool overlap) {
  const int64_t threads = int64_t(a.tokens_a_term) * a.strips * a.warps * 16;
  const dim3 grid(static_cast<unsigned>(CeilDiv(threads, kThreads)));
  return Launch(stream, CombineTermsKernel, grid, kThreads, 0, overlap, a);
}

}  // namespace flashllm::cuda
