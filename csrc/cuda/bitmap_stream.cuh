// A bitmap's way from memory to mma fragments: what the warps that load do with values and masks,
// and what the warps that compute make of them.
//
//   values   HBM ==bulk copies==> a ring a warp, in stages of 2 KB     two warps, a lane a ring
//   masks    HBM ==bulk copies==> another, in stages of two blocks     a third
//
// The values of a band are contiguous, so they come as a stream of stages that know nothing of
// blocks. Every stage has two mbarriers: full, and, for the warps that load to look at, empty.
#pragma once
#include "../bitmap.h"
#include "bitmap_scan.cuh"
#include "strips.cuh"

namespace flashllm::cuda {

using bitmap::kBlockTiles;

constexpr int kMaxWarps = 16;  // that compute
constexpr int kLoaders = 4;    // a warpgroup
#ifndef FLASHLLM_VALUE_STAGES
#define FLASHLLM_VALUE_STAGES 4  // unless the file that includes this has no room for them
#endif
constexpr int kValueStages = FLASHLLM_VALUE_STAGES;
constexpr uint32_t kTileBytes = 2048;  // of a full one: a stage is no less
constexpr uint32_t kValueStageBytes = kTileBytes;
constexpr uint32_t kValueStageVectors = kValueStageBytes / 16;
constexpr int kFirstStages = 2;  // asked for at first: more of them delay what is needed first
constexpr uint32_t kValueRingBytes = kValueStages * kValueStageBytes;
constexpr uint32_t kRingTail = 16;  // a lane's run that crosses the end: the first bytes again
constexpr int kMaskStages = 3, kMaskStageBlocks = 2;
constexpr uint32_t kBlockMaskBytes = kBlockTiles * 128;
constexpr uint32_t kMaskStageBytes = kMaskStageBlocks * kBlockMaskBytes;
constexpr uint32_t kMaskRingBytes = kMaskStages * kMaskStageBytes;
constexpr uint32_t kWarpBytes = kValueRingBytes + kRingTail + kMaskRingBytes;

// A ring of values of so many stages of so many bytes; Ring has those above.
template <int kStages_, uint32_t kStageBytes_>
struct RingOf {
  static constexpr int kStages = kStages_;
  static constexpr uint32_t kStageBytes = kStageBytes_, kStageVectors = kStageBytes / 16;
  static constexpr uint32_t kBytes = kStages * kStageBytes;
  static constexpr uint32_t kWarpBytes = kBytes + kRingTail + kMaskRingBytes;
  static_assert(kStages <= kValueStages && kStageBytes >= kTileBytes);
};
using Ring = RingOf<kValueStages, kValueStageBytes>;
// Masks that lie (garbage) may send a lane past the end of its ring: into its masks, no further.
static_assert(kMaskRingBytes >= kTileBytes);

constexpr int kMaxXStages = 7;  // as many as there is room for

// Shared memory: mbarriers, a warp's rings after another's, x.
constexpr uint32_t kXFull = 0, kXEmpty = kXFull + kMaxXStages * 8;
constexpr uint32_t kValueFull = kXEmpty + kMaxXStages * 8;
constexpr uint32_t kValueEmpty = kValueFull + kMaxWarps * kValueStages * 8;
constexpr uint32_t kMaskFull = kValueEmpty + kMaxWarps * kValueStages * 8;
constexpr uint32_t kMaskEmpty = kMaskFull + kMaxWarps * kMaskStages * 8;
constexpr uint32_t kControlBytes = (kMaskEmpty + kMaxWarps * kMaskStages * 8 + 127) / 128 * 128;

constexpr uint32_t kPollNs = 64;  // between looks of a warp that loads and has nothing to do

__host__ __device__ constexpr int RoundUp(int i, int to) { return (i + to - 1) / to * to; }

// ---- what a CTA has to do ----

struct Work {
  int strip, block, count;  // the first unit, and how many
  int warps, place;         // that compute, and the first one's place in the strip
};

// The band of the warp at this place in a strip. A wide kernel's strips are a strip of W for each
// group of tokens.
__device__ __forceinline__ int BandAt(const Args& a, int strip, int place) {
  return strip / a.strip_groups * a.warps + place;
}

// Vectors of 16 bytes of values.
struct Range {
  uint32_t first, end;
};

// Of a band's `blocks` blocks from `block` on; none behind W. As loaded: may be garbage.
__device__ __forceinline__ Range LoadRange(const Args& a, int band, int block, int blocks) {
  if (band >= a.bands || blocks == 0) return {0, 0};
  const uint32_t* p = a.offsets + int64_t(band / a.shard_bands) * a.shard_offsets +
                      int64_t(band % a.shard_bands) * a.blocks + block;
  return {__ldg(p), __ldg(p + blocks)};
}

__device__ __forceinline__ Range Clamp(const Args& a, Range r) {
  const uint32_t capacity = static_cast<uint32_t>(min(a.capacity, int64_t(0xffffffffu)));
  r.first = min(r.first, capacity);
  r.end = max(min(r.end, capacity), r.first);
  return r;
}

__device__ __forceinline__ const uint8_t* ValuesAt(const Args& a, int band, uint32_t vector) {
  return reinterpret_cast<const uint8_t*>(a.values) +
         (int64_t(band / a.shard_bands) * a.capacity + vector) * 16;
}

// Vectors of a stage that lie before this address.
template <typename R = Ring>
__device__ __forceinline__ uint32_t Phase(const uint8_t* p) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p)) / 16 % R::kStageVectors;
}

// ---- the warps that load ----

// Copies of one lane. A phase: Copy and Zero as often as wanted, then Arrive.
#if __CUDA_ARCH__ >= 900
template <bool kOnce>
__device__ __forceinline__ void Copy(uint32_t to, const void* from, uint32_t bytes, uint32_t full) {
  ptx::BarrierExpectMore(full, bytes);
  // What is read once leaves in the L2 cache what other kernels have there.
  if constexpr (kOnce)
    ptx::BulkCopyOnce(to, from, bytes, full);
  else
    ptx::BulkCopy(to, from, bytes, full);
}
__device__ __forceinline__ void Zero(const Args&, uint32_t to, uint32_t bytes) {
  if (bytes == 0) return;
  for (uint32_t i = 0; i < bytes; i += 16) ptx::ZeroShared128(to + i);
  ptx::FenceProxyAsync();  // bulk copies will write there again
}
__device__ __forceinline__ void Arrive(uint32_t full) { ptx::BarrierArrive(full); }
#else
template <bool kOnce>
__device__ __forceinline__ void Copy(uint32_t to, const void* from, uint32_t bytes, uint32_t full) {
  for (uint32_t i = 0; i < bytes; i += 16)
    ptx::CopyAsync16(to + i, static_cast<const uint8_t*>(from) + i);
}
__device__ __forceinline__ void Zero(const Args& a, uint32_t to, uint32_t bytes) {
  for (uint32_t i = 0; i < bytes; i += 16) ptx::CopyAsyncZero16(to + i, a.offsets);
}
__device__ __forceinline__ void Arrive(uint32_t full) { ptx::CopyAsyncArrive(full); }
#endif

// Values of one warp that computes: a lane's job. `idle` lanes have none.
template <typename R = Ring>
__device__ __forceinline__ void LoadValues(const Args& a, uint32_t control, Work work, int warp,
                                           bool idle) {
  const uint32_t full = control + kValueFull + warp * R::kStages * 8;
  const uint32_t empty = control + kValueEmpty + warp * R::kStages * 8;
  const uint32_t ring = control + kControlBytes + warp * R::kWarpBytes;
  int strip = work.strip, band = BandAt(a, strip, work.place + warp), left = work.count,
      blocks = min(left, a.blocks - work.block);
  Range next = {0, 0};
  if (!idle) {
    next = LoadRange(a, band, work.block, blocks);
    for (int i = 0; i < R::kStages; ++i)
      ptx::BarrierInit(full + i * 8, 1), ptx::BarrierInit(empty + i * 8, kArrivals);
  }
  ptx::FenceBarrierInit();
  __syncwarp();
  const uint8_t* from = nullptr;
  uint32_t rest = 0, issued = 0;  // vectors of the strip; stages
  bool done = idle, landed = idle;
  for (int i = 0;; ++i) {
    while (!done && rest == 0) {
      if (left == 0) {
        done = true;
        break;
      }
      const Range r = Clamp(a, next);
      from = ValuesAt(a, band, r.first);
      rest = r.end - r.first;
      left -= blocks;
      band = BandAt(a, ++strip, work.place + warp);
      blocks = min(left, a.blocks);
      next = LoadRange(a, band, 0, blocks);
    }
    if (!landed && i > 0) landed = ptx::BarrierLook(full, 0);
    const uint32_t slot = issued % R::kStages, round = issued / R::kStages;
    const bool room = !done && (landed || issued < kFirstStages) &&
                      ptx::BarrierLook(empty + slot * 8, round & 1 ^ 1);
    if (room) {
      // Stages end at multiples of their length: no line of memory is fetched twice.
      const uint32_t phase = Phase<R>(from);
      const uint32_t n = min(rest, R::kStageVectors - phase);
      const uint32_t to = ring + slot * R::kStageBytes + phase * 16, barrier = full + slot * 8;
      Copy<true>(to, from, n * 16, barrier);
      if (slot == 0) Copy<true>(ring + R::kBytes, from, kRingTail, barrier);
      Arrive(barrier);
      from += n * 16;
      rest -= n;
      ++issued;
    }
    if (i == 0) ptx::CtaBarrier();  // barriers are there
    if (__all_sync(~0u, done)) break;
    if (i >= R::kStages && !__any_sync(~0u, room)) ptx::Sleep(kPollNs);
  }
}

// Masks likewise. Tiles behind W have none.
template <typename R = Ring>
__device__ __forceinline__ void LoadMasks(const Args& a, uint32_t control, Work work, int warp) {
  const bool idle = warp >= work.warps;
  const uint32_t full = control + kMaskFull + warp * kMaskStages * 8;
  const uint32_t empty = control + kMaskEmpty + warp * kMaskStages * 8;
  const uint32_t ring = control + kControlBytes + warp * R::kWarpBytes + R::kBytes + kRingTail;
  if (!idle) {
    for (int i = 0; i < kMaskStages; ++i)
      ptx::BarrierInit(full + i * 8, 1), ptx::BarrierInit(empty + i * 8, kArrivals);
  }
  ptx::FenceBarrierInit();
  __syncwarp();
  int strip = work.strip, band = BandAt(a, strip, work.place + warp), block = work.block;
  int left = idle ? 0 : work.count;
  int slot = 0;
  uint32_t parity = 1;
  bool first = true, landed = idle;
  for (int i = 0;; ++i) {
    if (!landed && i > 0) landed = ptx::BarrierLook(full, 0);
    const bool room = left && (landed || first) && ptx::BarrierLook(empty + slot * 8, parity);
    if (room) {
      uint32_t to = ring + slot * kMaskStageBytes;
      const uint32_t barrier = full + slot * 8;
      for (int stage = min(left, kMaskStageBlocks); stage;) {
        const int n = min(stage, a.blocks - block);
        const int tiles = band < a.bands ? min(n * kBlockTiles, a.tiles - block * kBlockTiles) : 0;
        if (tiles)
          Copy<true>(to, a.index + (int64_t(band) * a.tiles + block * kBlockTiles) * 32,
                     tiles * 128, barrier);
        Zero(a, to + tiles * 128, (n * kBlockTiles - tiles) * 128);
        to += n * kBlockMaskBytes;
        stage -= n, left -= n, block += n;
        if (block == a.blocks) block = 0, band = BandAt(a, ++strip, work.place + warp);
      }
      Arrive(barrier);
      first = false;
      if (++slot == kMaskStages) slot = 0, parity ^= 1;
    }
    if (i == 0) ptx::CtaBarrier();
    if (!__any_sync(~0u, left)) break;
    if (i >= kMaskStages && !__any_sync(~0u, room)) ptx::Sleep(kPollNs);
  }
}

// ---- unpack ----

template <int kBit>
__device__ __forceinline__ uint32_t Take(uint32_t mask, uint32_t address) {
  uint32_t v = 0;
  if (mask & (1u << kBit)) v = ptx::LoadShared16(address);
  return v;
}

// ---- the stream of values, as the warp that computes sees it ----

// Addresses count on past the end of the ring and fall back by its size when the stage at its
// start is waited for: `Wait` then says true. All lanes hold the same.
template <typename R>
struct StreamOf {
  uint32_t full, empty, origin;   // barriers; address of vector 0 of `values`
  uint32_t waited = 0;            // stages
  uint32_t ready = 0, limit = 0;  // addresses: landed up to here, and the strip's end

  // Enters the next strip, at `limit`, and says where its first value lies.
  __device__ uint32_t Enter(Range r, uint32_t phase) {
    const uint32_t start = limit + phase * 16, vectors = r.end - r.first;
    origin = start - r.first * 16;
    if (vectors)
      limit += (phase + vectors + R::kStageVectors - 1) / R::kStageVectors * R::kStageBytes;
    return vectors ? start : limit;
  }

  // Waits for the next stage. The one before the last is read no more.
  __device__ __forceinline__ bool Wait(int lane) {
    __syncwarp();
    if (waited >= 2 && Frees(lane)) ptx::BarrierArrive(empty + (waited - 2) % R::kStages * 8);
    ptx::BarrierWait(full + waited % R::kStages * 8, waited / R::kStages & 1);
    const bool wraps = waited % R::kStages == 0 && waited != 0;
    if (wraps) ready -= R::kBytes, limit -= R::kBytes, origin -= R::kBytes;
    ready += R::kStageBytes;
    ++waited;
    return wraps;
  }
};
using Stream = StreamOf<Ring>;

}  // namespace flashllm::cuda
