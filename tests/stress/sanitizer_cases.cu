// What compute-sanitizer makes of habits of the main loops (csrc/cuda/bitmap_stream.cuh), each
// beside the same thing said otherwise. The table is of an H100 and compute-sanitizer 2025.3.1.
//
//   nvcc -std=c++17 -O2 -arch=sm_90a -lineinfo tests/stress/sanitizer_cases.cu -o sanitizer_cases
//   compute-sanitizer --tool racecheck ./sanitizer_cases ring
//
//   racecheck   ring          lane 0 frees a stage for its warp, after __syncwarp   right   1
//   errors
//               ring_all      every lane frees it                                   right   0
//               ring_wrong    the same, and the copies do not wait for it           wrong   2
//               two_rings     two such rings, filled by two lanes of one warp       right   1
//   synccheck   sites         warps meet at the CTA's barrier from two places       right   32
//               sites_any     the same by barrier.sync, whose threads need not      right   0
//                             come from one place
//
// So what these tools report of the kernels is not yet a fault: docs/reliability.md.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

constexpr int kStages = 2, kWords = 64, kRounds = 16;

__device__ uint32_t At(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ void Init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ void Arrive(uint32_t barrier) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(barrier) : "memory");
}

__device__ void Wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
        " selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
}

__device__ void Copy(uint32_t to, const void* from, uint32_t bytes, uint32_t full) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(full), "r"(bytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(full)
      : "memory");
  Arrive(full);
}

// kRings rings: one warp fills them with bulk copies, a lane a ring, and a warp each reads them.
// kAll: every lane frees a stage, not lane 0 for its warp. kWaits: copies wait for that.
template <int kRings, bool kAll, bool kWaits>
__global__ void Rings(const uint32_t* from, uint32_t* to) {
  __shared__ __align__(128) uint32_t rings[kRings][kStages][kWords];
  __shared__ __align__(8) uint64_t barriers[kRings][2 * kStages];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int ring = warp < kRings ? warp : lane % kRings;
  const uint32_t full = At(barriers[ring]), empty = full + kStages * 8;
  if (warp == kRings && lane < kRings) {
    for (int i = 0; i < kStages; ++i) Init(full + i * 8, 1), Init(empty + i * 8, kAll ? 32 : 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  if (warp == kRings) {
    for (int i = 0; lane < kRings && i < kRounds; ++i) {
      const int slot = i % kStages;
      if (kWaits)
        Wait(empty + slot * 8, i / kStages & 1 ^ 1);
      else
        __nanosleep(20000);
      Copy(At(rings[ring][slot]), from + i * kWords, kWords * 4, full + slot * 8);
    }
    return;
  }
  for (int i = 0; i < kRounds; ++i) {
    const int slot = i % kStages;
    Wait(full + slot * 8, i / kStages & 1);
    uint32_t v[2];
    for (int k = 0; k < 2; ++k)
      asm volatile("ld.shared.u32 %0, [%1];"
                   : "=r"(v[k])
                   : "r"(At(rings[warp][slot] + k * 32 + lane)));
    if (kAll) {
      Arrive(empty + slot * 8);
    } else {
      __syncwarp();
      if (lane == 0) Arrive(empty + slot * 8);
    }
    if (warp == 0)
      for (int k = 0; k < 2; ++k) to[i * kWords + k * 32 + lane] = v[k];
  }
}

template <bool kAny>
__device__ void Meet() {
  if (kAny)
    asm volatile("barrier.sync 0;" ::: "memory");
  else
    __syncthreads();
}

template <bool kAny>
__global__ void Sites(const uint32_t* from, uint32_t* to) {
  const int warp = threadIdx.x / 32;
  if (warp >= 4) {
    for (int i = 0; i < 3; ++i) {
      if (i == 0) Meet<kAny>();
      if (warp == 5) break;
      __nanosleep(2000);
    }
    return;
  }
  Meet<kAny>();
  for (int i = threadIdx.x; i < kRounds * kWords; i += 128) to[i] = from[i];
}

int main(int argc, char** argv) {
  uint32_t host[kRounds * kWords], got[kRounds * kWords], *from, *to;
  for (int i = 0; i < kRounds * kWords; ++i) host[i] = i * 2654435761u;
  cudaMalloc(&from, sizeof host), cudaMalloc(&to, sizeof host);
  cudaMemcpy(from, host, sizeof host, cudaMemcpyHostToDevice);
  const struct {
    const char* name;
    int threads;
    void (*kernel)(const uint32_t*, uint32_t*);
  } cases[] = {{"ring", 64, Rings<1, false, true>},
               {"ring_all", 64, Rings<1, true, true>},
               {"ring_wrong", 64, Rings<1, true, false>},
               {"two_rings", 96, Rings<2, true, true>},
               {"sites", 256, Sites<false>},
               {"sites_any", 256, Sites<true>}};
  for (const auto& c : cases) {
    if (argc > 1 && std::strcmp(argv[1], c.name)) continue;
    c.kernel<<<1, c.threads>>>(from, to);
    const cudaError_t e = cudaDeviceSynchronize();
    cudaMemcpy(got, to, sizeof host, cudaMemcpyDeviceToHost);
    std::printf("%s: %s, %s\n", c.name, cudaGetErrorString(e),
                std::memcmp(got, host, sizeof host) ? "wrong" : "right");
  }
}
