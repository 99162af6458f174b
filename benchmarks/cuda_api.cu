// The CUDA kernels behind plain C calls, for timing outside XLA (benchmarks/gpu_timing.py).
// Built by `cmake --build . --target flashllm_cuda_api`; not part of the package.
#include "../csrc/cuda/spmm.h"

namespace {

using namespace flashllm::cuda;

bool g_overlap = false, g_follows = false;

__global__ void ReadKernel(const uint4* data, size_t n, uint4* out) {
  uint4 sum = make_uint4(0, 0, 0, 0);
  const size_t stride = size_t(gridDim.x) * blockDim.x;
  size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < n; i += 4 * stride) {
    uint4 v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = __ldcs(data + i + j * stride);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum.x ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (sum.x == 0x12345678u) *out = sum;
}

Dense Whole(const void* dense, int64_t m, int64_t k) {
  return {static_cast<uint16_t*>(const_cast<void*>(dense)), m, k, 1, m, k};
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int flashllm_initialize() {
  if (cudaError_t e = InitializeBitmap(&g_overlap)) return e;
  if (cudaError_t e = InitializeBitmapWide()) return e;
  if (cudaError_t e = InitializeBitmapGemm()) return e;
  return InitializeDeltaCsr();
}

// Whether a product may start before its predecessor on the stream ends, which must not write W.
__attribute__((visibility("default"))) void flashllm_in_a_row(int follows) { g_follows = follows; }

__attribute__((visibility("default"))) int flashllm_read(void* stream, const void* data,
                                                         size_t bytes, void* out) {
  ReadKernel<<<132 * 8, 512, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint4*>(data), bytes / 16, static_cast<uint4*>(out));
  return cudaGetLastError();
}

// Encoding a dense [m, k]: count sizes the rest (where `offsets` end), fill writes it.
__attribute__((visibility("default"))) int flashllm_count(void* stream, int format,
                                                          const void* dense, int64_t m, int64_t k,
                                                          void* index, void* offsets) {
  const Dense d = Whole(dense, m, k);
  const auto s = static_cast<cudaStream_t>(stream);
  uint32_t* o = static_cast<uint32_t*>(offsets);
  if (static_cast<Format>(format) == Format::kBitmap)
    return CountBitmap(s, d, 1, static_cast<uint32_t*>(index), o);
  return CountDeltaCsr(s, d, 1, o);
}

__attribute__((visibility("default"))) int flashllm_fill(void* stream, int format,
                                                         const void* dense, int64_t m, int64_t k,
                                                         int64_t capacity, int64_t index_capacity,
                                                         void* index, const void* offsets,
                                                         void* values) {
  Problem p = {};
  p.format = static_cast<Format>(format);
  p.index = static_cast<const uint32_t*>(index);
  p.offsets = static_cast<const uint32_t*>(offsets);
  p.shards = 1, p.rows = m, p.k = k, p.capacity = capacity, p.index_capacity = index_capacity;
  const auto s = static_cast<cudaStream_t>(stream);
  uint16_t* v = static_cast<uint16_t*>(values);
  if (p.format == Format::kBitmap) return Sample(s, p, Whole(dense, m, k), v);
  return FillDeltaCsr(s, p, Whole(dense, m, k), static_cast<uint32_t*>(index), v);
}

__attribute__((visibility("default"))) int flashllm_decode(void* stream, int format,
                                                           const void* index, const void* offsets,
                                                           const void* values, int64_t m, int64_t k,
                                                           int64_t capacity, int64_t index_capacity,
                                                           void* dense) {
  Problem p = {};
  p.format = static_cast<Format>(format);
  p.index = static_cast<const uint32_t*>(index);
  p.offsets = static_cast<const uint32_t*>(offsets);
  p.values = static_cast<const uint16_t*>(values);
  p.shards = 1, p.rows = m, p.k = k, p.capacity = capacity, p.index_capacity = index_capacity;
  return Decode(static_cast<cudaStream_t>(stream), p, Whole(dense, m, k));
}

// types: 0 fp16, 1 bf16, 2 fp32; format: 0 bitmap, 1 Delta-CSR.
__attribute__((visibility("default"))) int flashllm_spmm(
    void* stream, int format, const void* index, const void* offsets, const void* values,
    int weight, int64_t m, int64_t k, int64_t capacity, int64_t index_capacity, const void* x,
    int token, int64_t n, const void* bias, void* y, int activation, int ctas, int warps, int group,
    int64_t chunk, int wide, void* workspace, size_t workspace_bytes) {
  Problem p = {};
  p.format = static_cast<Format>(format);
  p.index = static_cast<const uint32_t*>(index);
  p.offsets = static_cast<const uint32_t*>(offsets);
  p.values = static_cast<const uint16_t*>(values);
  p.weight = static_cast<Type>(weight);
  p.shards = 1, p.rows = m, p.k = k, p.capacity = capacity;
  p.index_capacity = index_capacity;
  p.x = x, p.token = static_cast<Type>(token), p.n = n;
  p.bias = bias, p.bias_type = p.token, p.y = y, p.activation = activation;
  const Plan plan = {ctas, warps, group, chunk, wide != 0, workspace, workspace_bytes};
  const char* why;
  return Spmm(static_cast<cudaStream_t>(stream), p, plan, g_overlap, g_follows, &why);
}
}
