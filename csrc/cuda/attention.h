// Attention of one new token a row over a key-value cache.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace flashllm::cuda {

enum class Kind : int { kF16, kBF16, kF32, kF8 };  // kF8: e4m3, the cache only

// qkv [rows, 3, heads, d]; keys and values [rows * heads, slots, d]; open [rows, slots]: what
// may be attended to, the new token's slot included; y [rows, heads, d]. The new token's k and v
// go to slot *length.
struct Attention {
  const void* qkv;
  void* keys;
  void* values;
  const bool* open;
  const int32_t* length;
  void* y;
  Kind token, cache;  // of qkv and y, of keys and values
  int64_t rows, heads, slots, d;
};

// Whether a head of d numbers is a whole number of 16-byte pieces, and at most 32 of them.
bool SupportsAttention(const Attention& a);
// overlap: whether the loaded code knows clusters and programmatic launches.
// follows: start before the predecessor ends, which is ours and writes neither cache, mask nor
// length; nor does what else may still run.
cudaError_t DecodeAttention(cudaStream_t stream, const Attention& a, bool overlap, bool follows);

}  // namespace flashllm::cuda
