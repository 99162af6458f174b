// wgmma: four warps multiply their 64 rows of A, in registers, by B in shared memory.
//
// Warp w of the warpgroup holds rows 16 w .. 16 w + 15 of A, in the registers of mma.m16n8k16, and
// its sums likewise, eight tokens at a time. B is [tokens, 64] halves, 128 bytes a token, swizzled:
// the 16-byte chunk c of token n lies at chunk c ^ (n % 8).
#pragma once
#include "ptx.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
namespace flashllm::cuda::ptx {

// Registers that were written become operands.
__device__ __forceinline__ void WgmmaFence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits for all that was started; c are its sums. The compiler moves them about after this only.
template <int kN8>
__device__ __forceinline__ void WgmmaWait(float (&c)[kN8][4]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < kN8 * 4; ++i) asm volatile("" : "+f"(c[i / 4][i % 4])::"memory");
}

// Waits for all that was committed but the last kCount.
template <int kCount>
__device__ __forceinline__ void WgmmaWaitAllBut() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kCount) : "memory");
}

// The descriptor of B at a multiple of 1024 bytes: 128-byte swizzle, 1024 bytes from eight tokens
// to the next. 16 columns further on are 2 more.
__device__ __forceinline__ uint64_t Descriptor(uint32_t address) {
  return uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 16 |
         (address & 0x3ffff) >> 4;
}

#define FLASHLLM_SUMS4(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define FLASHLLM_SUMS16(i) \
  FLASHLLM_SUMS4(i), FLASHLLM_SUMS4(i + 1), FLASHLLM_SUMS4(i + 2), FLASHLLM_SUMS4(i + 3)
#define FLASHLLM_SUMS32(i) FLASHLLM_SUMS16(i), FLASHLLM_SUMS16(i + 4)
#define FLASHLLM_SUMS64(i) FLASHLLM_SUMS32(i), FLASHLLM_SUMS32(i + 8)

#define FLASHLLM_WGMMA32(type)                                                                     \
  "{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type \
  " "                                                                                              \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "                       \
  "{%16, %17, %18, %19}, %20, p, 1, 1, 0; }"
#define FLASHLLM_WGMMA64(type)                                                                     \
  "{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type \
  " "                                                                                              \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "              \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                        \
  "{%32, %33, %34, %35}, %36, p, 1, 1, 0; }"
#define FLASHLLM_WGMMA128(type)                                                            \
  "{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." type \
  "." type                                                                                 \
  " "                                                                                      \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "      \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "       \
  "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "       \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                \
  "{%64, %65, %66, %67}, %68, p, 1, 1, 0; }"

// c += A B, 16 columns: started, not awaited.
template <bool kBf16>
__device__ __forceinline__ void Wgmma(float (&c)[4][4], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (kBf16)
    asm volatile(FLASHLLM_WGMMA32("bf16")
                 : FLASHLLM_SUMS16(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  else
    asm volatile(FLASHLLM_WGMMA32("f16")
                 : FLASHLLM_SUMS16(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <bool kBf16>
__device__ __forceinline__ void Wgmma(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (kBf16)
    asm volatile(FLASHLLM_WGMMA64("bf16")
                 : FLASHLLM_SUMS32(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  else
    asm volatile(FLASHLLM_WGMMA64("f16")
                 : FLASHLLM_SUMS32(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <bool kBf16>
__device__ __forceinline__ void Wgmma(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (kBf16)
    asm volatile(FLASHLLM_WGMMA128("bf16")
                 : FLASHLLM_SUMS64(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  else
    asm volatile(FLASHLLM_WGMMA128("f16")
                 : FLASHLLM_SUMS64(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef FLASHLLM_SUMS4
#undef FLASHLLM_SUMS16
#undef FLASHLLM_SUMS32
#undef FLASHLLM_SUMS64
#undef FLASHLLM_WGMMA32
#undef FLASHLLM_WGMMA64
#undef FLASHLLM_WGMMA128

}  // namespace flashllm::cuda::ptx
#endif
