// What a product is (Problem), how it runs (Plan), and who runs it.
//
//   x ---> [PrepareTokens] ---> main loop ---> [Combine or CombineTerms] ---> y
//          only for another         |          only for strips that CTAs share, or x in terms
//          dtype or ragged K        +--------- all other strips go straight to y
//
// With wgmma (Plan::wide) x is always laid out first, but for bitmap_gemm.cu where K % 8 is 0; that
// kernel adds shared strips up itself.
//
// A chain is products in a row, with a residual in the epilogue of some and a LayerNorm behind,
// and attention (attention.cu) between some:
//
//   x ---> product ---> attention ---> product, h += ... ---> LayerNorm ---> product ---> y
//
// Each kernel starts before the last one ends: a main loop reads W until x is there, attention its
// cache until q, k and v are.
//
// A bitmap's work is cut into strips (16 rows a warp) and units (a strip over 256 columns). CTA c
// takes the contiguous units [FirstUnit(c), FirstUnit(c + 1)): whole strips mostly, so that few
// sums have to be combined, and always in order of K, so that the same input gives the same bits.
// Delta-CSR's is cut into rows over a block of columns, delta_csr_spmm.cu.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace flashllm::cuda {

enum class Type : int { kF16, kBF16, kF32 };
enum class Format : int { kBitmap, kDeltaCsr };

struct Problem {
  Format format;
  const uint32_t* index;  // masks of a bitmap, index of Delta-CSR
  const uint32_t* offsets;
  const uint16_t* values;
  Type weight;  // fp16 or bf16
  int64_t shards, rows, k, capacity;
  int64_t index_capacity;  // words a shard
  const void* x;           // [n, k]
  Type token;              // of x and y
  int64_t n;
  const void* bias;  // [shards * rows] or null
  Type bias_type;
  void* y;  // [n, shards * rows]
  int activation;
  const void* residual;  // [n, shards * rows] of x's type, added last, or null
};

// Chosen by jax_flashllm/plan.py from shapes and the room for values.
struct Plan {
  int ctas;       // per group of tokens; if wide, in all; of Delta-CSR as many a block of columns
  int warps;      // per CTA
  int group;      // tokens a pass over W: 8, 16, 32 or 64; if wide 32, 64, 128 or 256; of
                  // Delta-CSR 1, 2, 4 or 8
  int64_t chunk;  // tokens of x a round of launches
  bool wide;      // bitmap_wide.cu, with groups of 32, 64 or 128; bitmap_gemm.cu, with 256
  void* workspace;
  size_t workspace_bytes;
};

// An x in another type than W is split into terms of W's type, each a token of its own:
// bf16 holds 8 significant bits, fp16 11, fp32 24. With W in fp16 a token is scaled by a power
// of two first, and each further term by 2^11, so that fp16's narrow exponent loses nothing
// above 2^-39 of the token's largest value.
inline int Terms(Type weight, Type token) {
  if (weight == token) return 1;
  return token == Type::kF32 ? 3 : 2;
}

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline size_t Align(size_t bytes) { return (bytes + 255) / 256 * 256; }  // of a workspace's parts

// Tensor cores read whole tiles of 64 columns.
inline int64_t PaddedK(int64_t k) { return CeilDiv(k, 64) * 64; }

inline bool NeedsPrepare(const Problem& p) { return p.weight != p.token || p.k % 64 != 0; }

// ---- what kernels share ----

struct Output {
  void* y;
  const void* bias;
  Type type, bias_type;
  int activation;
  int64_t rows;  // shards * rows: the stride of a token in y
  const void* residual;
};

struct Args {
  const uint32_t* index;
  const uint32_t* offsets;
  const uint16_t* values;
  const uint16_t* x;  // [tokens, x_stride] in W's type, whole tiles; PrepareWide's; gemm: K columns
  int64_t x_stride;
  int tokens;
  Output out;
  float* partial;        // [groups][ctas][slots][warps][group / 8][32] float4; of Delta-CSR
                         // [blocks][tokens][shards * rows]
  uint32_t* flags;       // [ctas][warps]: whether the partial sums of these rows are there
  const float* unscale;  // per token of x, for terms
  int terms, tokens_a_term;
  float term_step;                             // 2^-11 for fp16 terms, 1 for bf16
  bool keep_all;                               // every strip goes through `partial`
  int64_t capacity, index_capacity;            // of a shard, in 16 bytes
  int units;                                   // strips * blocks
  int share, longer;                           // units / ctas, units % ctas
  int shard_rows, shard_bands, bands, strips;  // bands of 16 rows
  int tiles, blocks;                           // of a band; units of a strip
  int shard_offsets;                           // offsets a shard
  int ctas, warps, slots, groups, group;       // ctas: clusters, where they share a strip
  int x_stages;                                // of a bitmap's x in shared memory; odd
  // Of Delta-CSR: a strip is a row, and those of a block are shared out among its CTAs' warps; any
  // slots: sums go to `partial`.
  int block_cols, block_ctas;
  // Groups of tokens have a schedule, and partial sums, of their own; if wide there is one
  // schedule, of a strip of W for each group, groups innermost.
  bool wide, gemm;   // gemm: bitmap_gemm.cu, from 129 tokens on
  int strip_groups;  // 1 unless wide; then `groups` is 1
};

struct Sizes {
  size_t tokens, unscale, partial, flags;
  size_t total() const { return tokens + unscale + partial + flags; }
};

// Fills everything but pointers into x, y and the workspace, for a chunk of n tokens.
Args MakeArgs(const Problem& p, const Plan& plan, int64_t n);
Sizes WorkspaceSizes(const Problem& p, const Args& a);

// overlap: launch kernels before their predecessor in here ends; they wait themselves.
// follows: the first one too, its predecessor being ours and nothing still writing W.
// On cudaErrorInvalidValue `why` may hold the reason.
cudaError_t Spmm(cudaStream_t stream, const Problem& p, Plan plan, bool overlap, bool follows,
                 const char** why);

// Main loops and their helpers, one file each.
cudaError_t BitmapSpmm(cudaStream_t stream, const Args& a, bool bf16, bool overlap);
cudaError_t BitmapWide(cudaStream_t stream, const Args& a, bool bf16);
cudaError_t BitmapGemm(cudaStream_t stream, const Args& a, bool bf16);
cudaError_t DeltaCsrSpmm(cudaStream_t stream, const Args& a, bool bf16, bool overlap);
cudaError_t PrepareTokens(cudaStream_t stream, const void* x, Type token, Type weight, int64_t n,
                          int64_t k, int64_t k_padded, int terms, uint16_t* out, float* unscale);
// x [n, k] for BitmapWide: a group's tiles of 64 columns in turn, each as it lies in shared memory
// (wgmma.cuh), zeros behind n and k.
cudaError_t PrepareWide(cudaStream_t stream, const uint16_t* x, int64_t n, int64_t k, uint16_t* out,
                        const Args& a);
cudaError_t Combine(cudaStream_t stream, const Args& a, bool overlap);
cudaError_t CombineTerms(cudaStream_t stream, const Args& a, bool overlap);
cudaError_t CombineDeltaCsr(cudaStream_t stream, const Args& a, bool overlap);

// y = LayerNorm(h) * scale + shift.
struct Norm {
  const void* h;
  void* y;
  Type type;  // of both, fp16 or bf16
  int64_t tokens, width;
  const void *scale, *shift;  // [width] or null
  Type scale_type, shift_type;
  float epsilon;
};
cudaError_t LayerNorm(cudaStream_t stream, const Norm& a, bool overlap);

// A dense matrix; shard c * row_blocks + r of a weight is its row block r of column block c.
struct Dense {
  uint16_t* data;      // row-major
  int64_t rows, cols;  // M, K
  int64_t row_blocks, shard_rows, shard_cols;
};

// W to dense, and dense to values of W's nonzeros. An encoder counts first, then fills: a bitmap
// with Sample, Delta-CSR's values and index with FillDeltaCsr.
cudaError_t Decode(cudaStream_t stream, const Problem& p, const Dense& to);
cudaError_t Sample(cudaStream_t stream, const Problem& p, const Dense& from, uint16_t* values);
cudaError_t CountBitmap(cudaStream_t stream, const Dense& from, int64_t shards, uint32_t* masks,
                        uint32_t* offsets);
cudaError_t CountDeltaCsr(cudaStream_t stream, const Dense& from, int64_t shards,
                          uint32_t* offsets);
cudaError_t FillDeltaCsr(cudaStream_t stream, const Problem& p, const Dense& from, uint32_t* index,
                         uint16_t* values);

// Once a device, outside any capture: loads the kernels and raises their shared memory.
// overlap: whether the loaded code knows programmatic dependent launch.
cudaError_t InitializeBitmap(bool* overlap);
cudaError_t InitializeBitmapWide();
cudaError_t InitializeBitmapGemm();
cudaError_t InitializeDeltaCsr();

// The most shared memory that a CTA may ask for.
inline cudaError_t MaxShared(int* bytes) {
  int device;
  if (cudaError_t e = cudaGetDevice(&device)) return e;
  return cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// A launch whose kernel waits (ptx::WaitForPrevious) for its predecessor, and so may start early;
// `cluster` CTAs along x at a time.
template <typename... Parameters>
cudaError_t LaunchClusters(cudaStream_t stream, int cluster, void (*kernel)(Parameters...),
                           dim3 grid, int threads, size_t shared, bool overlap,
                           Parameters... parameters) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  if (overlap) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  config.attrs = attributes;
  return cudaLaunchKernelEx(&config, kernel, parameters...);
}

template <typename... Parameters>
cudaError_t Launch(cudaStream_t stream, void (*kernel)(Parameters...), dim3 grid, int threads,
                   size_t shared, bool overlap, Parameters... parameters) {
  return LaunchClusters(stream, 1, kernel, grid, threads, shared, overlap, parameters...);
}

}  // namespace flashllm::cuda
