// A warp's ring of shared memory, filled by asynchronous copies ahead of their use.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace flashllm::cuda {

constexpr int kSlots = 8;  // copies in flight at most, each with an mbarrier
constexpr int kRingAlign = 128;

// Pieces of any size, in order, back to back.
struct Ring {
  uint32_t base, bytes, barriers;
  uint32_t head = 0, tail = 0;  // byte offsets: next free, oldest held
  int issued = 0, taken = 0;    // pieces

  // Claims room for `size` bytes; false if there is none now.
  __device__ bool Claim(uint32_t size, uint32_t* start) {
    const int held = issued - taken;
    if (held == kSlots) return false;
    if (held == 0) head = tail = 0;
    if (held == 0 || head > tail) {  // free: [head, bytes) and [0, tail)
      if (head + size > bytes) {
        if (held == 0 || size > tail) return false;
        head = 0;
      }
    } else if (size > tail - head) {  // free: [head, tail)
      return false;
    }
    *start = head;
    head += size;
    return true;
  }
};

inline cudaError_t MaxShared(int* bytes) {
  int device;
  if (cudaError_t e = cudaGetDevice(&device)) return e;
  return cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

}  // namespace flashllm::cuda
