// Tiled-CSL main loop: a team of two warps walks a strip of 64 rows, scatters a block's nonzeros
// into a dense block in shared memory, and reads that back as mma fragments.
//
//   team t of a CTA   rows 64 (strip * teams + t) .., the strip's blocks of 128 columns in turn
//
//   values            HBM ==bulk copies==> a ring of 4 stages a team    one warp, a lane a team
//   codes, positions  HBM ==bulk copies==> another                      another warp, likewise
//   x                 L2  ==bulk copies==> a ring of the CTA's          a third
//
//   block   | wait | scatter: warp h the lists h of all banks, half of the tail | sync |
//           | warp h: A fragments of 32 rows x k128, 16 mma a token octet | undo or clear | sync |
//
// What a team reads of W is one run of bytes for as long as its strip lasts: stages know nothing
// of blocks. Work follows the nonzeros: a lane walks a list of its bank, and one dp4a turns four
// 4-bit steps into an address, prefix sum included, for one store without bank conflicts.
//
// A block of few chunks is undone, by the same addresses again with zeros. Others are cleared as
// they are read.
#include <algorithm>
#include <type_traits>

#include "../tiled_csl.h"
#include "strips.cuh"
#include "tiled_csl_block.cuh"

namespace flashllm::cuda {
namespace {

using tiled_csl::kLists;
using tiled_csl::kRows;

constexpr int kMaxTeams = 8;
constexpr int kTeamWarps = 2 * kMaxTeams;        // the first warps of a CTA, used or not
constexpr int kThreads = (kTeamWarps + 4) * 32;  // four more load: a warpgroup
constexpr int kTeamBands = tiled_csl::kBlockRows / 16;
constexpr int kWarpBands = kTeamBands / 2;
constexpr int kRowBytes = kLists * 2;
constexpr int kScratchBytes = (kRows + 1) * kRowBytes;
constexpr int kChunkVectors = tiled_csl::kChunkValues / 8;  // of 16 bytes
constexpr int kCodeVectors = tiled_csl::kChunkWords / 4;
constexpr int kStages = 4;    // of a stream, each with an mbarrier
constexpr int kSegment = 32;  // blocks whose sizes a warp holds, one a lane
// Undoing takes 10 wavefronts of shared memory a chunk and 14 instructions a warp, clearing 128
// a block and 16.
constexpr int kUndoChunks = 5;
// Tokens of the x ring are 256 bytes and 16 of padding: lanes of eight tokens meet in no bank.
constexpr int kTokenBytes = tiled_csl::kBlockCols * 2, kTokenStride = kTokenBytes + 16;
// Codes that lie (garbage) lead a lane past its dense block by at most this much.
constexpr int kOvershoot = tiled_csl::kChunkEntries * tiled_csl::kFiller * kRowBytes;

constexpr int RoundUp(int i, int to) { return (i + to - 1) / to * to; }

// Shared memory: control, x, dense blocks, rings of values, rings of index. A ring starts at a
// multiple of its length, so that a mask wraps addresses.
template <int kN8>
struct Layout {
  static constexpr int kValueStage = kN8 <= 2 ? 128 : 64;  // vectors
  static constexpr int kIndexStage = 32;
  static constexpr int kXStages = kN8 == 1 ? 6 : kN8 == 2 ? 3 : 2;
  static constexpr int kXBytes = kN8 * 8 * kTokenStride;  // of a stage
  static constexpr int kValueRing = kStages * kValueStage * 16;
  static constexpr int kIndexRing = kStages * kIndexStage * 16;
  // Control: mbarriers of the streams' stages and of x (full, empty), then how many stages of
  // each stream are used up.
  static constexpr int kStream = kStages * 8;
  static constexpr int kX = 2 * kMaxTeams * kStream;
  static constexpr int kUsed = kX + kXStages * 16;
  static constexpr int kControlBytes = RoundUp(kUsed + 2 * kMaxTeams * 4, 128);
  // A block is scattered in rounds, between which its stages are refilled.
  static constexpr int kRoundChunks = kValueStage / 16, kRoundTails = kIndexStage;
  // No round touches more stages than there are.
  static_assert((kRoundChunks * kChunkVectors + kRoundTails - 2) / kValueStage + 2 <= kStages);
  static_assert((kRoundChunks * kCodeVectors + kRoundTails - 2) / kIndexStage + 2 <= kStages);
  static_assert(kValueRing % kIndexRing == 0);

  static constexpr int kScratches = kControlBytes + kXStages * kXBytes;  // from the start
  __host__ __device__ static constexpr int Rings(int teams, int start) {
    return RoundUp(start + kScratches + teams * kScratchBytes, kValueRing) - start;
  }
  // The driver keeps the first KiB to itself, or nothing.
  static int Bytes(int teams) {
    const int rings = std::max(Rings(teams, 0), Rings(teams, 1024));
    return std::max(rings + teams * (kValueRing + kIndexRing),
                    kScratches + teams * kScratchBytes + kOvershoot);
  }
};

// The offsets of a team's block; none behind W.
__device__ __forceinline__ const uint2* TeamOffsets(const Args& a, int strip, int block, int team,
                                                    int* shard) {
  const int row = strip * (a.warps / 2) + team, shard_rows = a.shard_bands / kTeamBands;
  *shard = row / shard_rows;
  if (row * kTeamBands >= a.bands) return nullptr;
  return reinterpret_cast<const uint2*>(a.offsets + int64_t(*shard) * a.shard_offsets) +
         int64_t(row % shard_rows) * a.blocks + block;
}

// Blocks from this one on, of `left`, whose sizes are held together: a segment.
__device__ __forceinline__ int SegmentBlocks(const Args& a, int block, int left) {
  return min(min(left, kSegment - block % kSegment), a.blocks - block);
}

// Whether what lies between two offsets (which may be garbage) is in the buffers.
__device__ __forceinline__ bool Inside(const Args& a, uint2 begin, uint2 end) {
  return begin.x <= end.x && begin.y <= end.y &&
         int64_t(end.x) * kChunkVectors + end.y <= a.capacity &&
         int64_t(end.x) * kCodeVectors + end.y <= a.index_capacity;
}

// ---- the warps that load ----

#if __CUDA_ARCH__ >= 900
constexpr int kXArrivals = 1;
#else
constexpr int kXArrivals = 32;  // every lane copies
#endif

// One of the two streams of all teams, a lane each. Ends with the CTA's work.
template <int kN8, bool kIndex>
__device__ __forceinline__ void StreamW(const Args& a, uint32_t control, uint32_t rings, int strip,
                                        int block, int left, int team) {
  using L = Layout<kN8>;
  constexpr int kStage = kIndex ? L::kIndexStage : L::kValueStage;
  constexpr int64_t kVectors = kIndex ? kCodeVectors : kChunkVectors;  // of a chunk
  const int teams = a.warps / 2;
  const uint32_t full = control + (team * 2 + kIndex) * L::kStream;
  const uint32_t used = control + L::kUsed + (team * 2 + kIndex) * 4;
  const uint32_t ring =
      rings + (kIndex ? teams * L::kValueRing + team * L::kIndexRing : team * L::kValueRing);
  bool done = team >= teams;
  // The segment to come: its offsets are asked for a segment ahead.
  uint2 begin, end;
  int shard;
  auto fetch = [&] {
    begin = end = make_uint2(0, 0);
    const uint2* const o = done || left == 0 ? nullptr : TeamOffsets(a, strip, block, team, &shard);
    if (o) begin = __ldg(o), end = __ldg(o + SegmentBlocks(a, block, left));
  };
  fetch();
  const uint4* source = nullptr;
  uint32_t rest = 0;    // vectors of the segment to come
  uint32_t phase = 0;   // of its next stage that lie before it
  uint32_t issued = 0;  // stages
  while (!__all_sync(~0u, done)) {
    while (!done && rest == 0) {
      if (left == 0) {
        done = true;
        break;
      }
      if (Inside(a, begin, end)) {
        const int64_t first =
            shard * (kIndex ? a.index_capacity : a.capacity) + kVectors * begin.x + begin.y;
        const void* const buffer = kIndex ? static_cast<const void*>(a.index) : a.values;
        source = static_cast<const uint4*>(buffer) + first;
        rest = static_cast<uint32_t>(kVectors * (end.x - begin.x) + (end.y - begin.y));
        phase = static_cast<uint32_t>(first) % kStage;  // stages end at multiples of their length
      }
      const int n = SegmentBlocks(a, block, left);
      left -= n;
      if ((block += n) == a.blocks) block = 0, ++strip;
      fetch();
    }
    if (done || issued - ptx::LoadSharedAcquire(used) >= kStages) continue;
    const uint32_t n = min(rest, kStage - phase), slot = issued % kStages;
    const uint32_t to = ring + (slot * kStage + phase) * 16, barrier = full + slot * 8;
#if __CUDA_ARCH__ >= 900
    ptx::BarrierExpect(barrier, n * 16);
    ptx::BulkCopy(to, source, n * 16, barrier);
#else
    for (uint32_t v = 0; v < n; ++v) ptx::CopyAsync16(to + v * 16, source + v);
    ptx::CopyAsyncArrive(barrier);
#endif
    source += n, rest -= n, phase = 0;
    ++issued;
  }
}

// Barriers of the two streams and of x, a warp each; x of tokens that do not exist is zero.
template <int kN8>
__device__ __forceinline__ void InitStages(const Args& a, uint32_t control, uint32_t x_ring,
                                           int tokens, int loader, int lane) {
  using L = Layout<kN8>;
  if (loader < 2) {
    const int stream = lane * 2 + loader;
    if (lane < a.warps / 2) {
      for (int i = 0; i < kStages; ++i) ptx::BarrierInit(control + stream * L::kStream + i * 8, 1);
      ptx::StoreShared32(control + L::kUsed + stream * 4, 0);
    }
  } else if (loader == 2) {
    if (lane < L::kXStages) {
      ptx::BarrierInit(control + L::kX + lane * 16, kXArrivals);
      ptx::BarrierInit(control + L::kX + lane * 16 + 8, a.warps * kArrivals);
    }
    for (int stage = 0; stage < L::kXStages; ++stage)
      for (int i = tokens * kTokenStride + lane * 16; i < L::kXBytes; i += 512)
        ptx::ZeroShared128(x_ring + stage * L::kXBytes + i);
  }
  ptx::FenceBarrierInit();
}

template <int kN8>
__device__ __forceinline__ void StreamX(const Args& a, uint32_t barriers, uint32_t ring, int group,
                                        int block, int count, int lane) {
  using L = Layout<kN8>;
  ptx::WaitForPrevious();  // weights depend on nothing before this kernel; x may
  const int token0 = group * kN8 * 8, tokens = min(kN8 * 8, a.tokens - token0);
  const uint16_t* const x = a.x + token0 * a.x_stride;
  int slot = 0;
  for (int i = 0; i < count; ++i) {
    const uint32_t full = barriers + slot * 16, to = ring + slot * L::kXBytes;
    ptx::BarrierWait(full + 8, i / L::kXStages & 1 ^ 1);
    const uint16_t* const from = x + block * tiled_csl::kBlockCols;
    const int bytes = min(kTokenBytes, (a.tiles - block * 2) * 128);
#if __CUDA_ARCH__ >= 900
    if (lane == 0) ptx::BarrierExpect(full, tokens * bytes);
    __syncwarp();
    for (int t = lane; t < tokens; t += 32)
      ptx::BulkCopy(to + t * kTokenStride, from + t * a.x_stride, bytes, full);
#else
    for (int v = lane; v < tokens * 16; v += 32)
      if (v % 16 * 16 < bytes)
        ptx::CopyAsync16(to + v / 16 * kTokenStride + v % 16 * 16,
                         from + v / 16 * a.x_stride + v % 16 * 8);
    ptx::CopyAsyncArrive(full);
#endif
    if (++slot == L::kXStages) slot = 0;
    if (++block == a.blocks) block = 0;
  }
}

template <bool kBf16, int kN8>
__global__ void __launch_bounds__(kThreads, 1) TiledCslKernel(const __grid_constant__ Args a) {
  using L = Layout<kN8>;
  extern __shared__ __align__(128) uint8_t shared[];
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const int group = blockIdx.y;
  const int cta = static_cast<int>(blockIdx.x);
  const int64_t unit0 = FirstUnit(a, cta);
  const int count = static_cast<int>(FirstUnit(a, cta + 1) - unit0);
  ptx::LaunchDependents();
  if (count == 0) return;

  const int strip0 = static_cast<int>(unit0 / a.blocks);
  const int block0 = static_cast<int>(unit0 % a.blocks);
  const uint32_t control = ptx::SharedAddress(shared), x_ring = control + L::kControlBytes;
  const int teams = a.warps / 2;
  const uint32_t rings = control + L::Rings(teams, control);
  // Sums of many tokens take the registers that warps which load do not need.
  constexpr bool kTrade = kN8 >= 4;
  if (warp >= kTeamWarps)
    InitStages<kN8>(a, control, x_ring, min(kN8 * 8, a.tokens - group * kN8 * 8), warp - kTeamWarps,
                    lane);
  __syncthreads();
  if (warp >= kTeamWarps) {
    if (kTrade) ptx::LowerRegisters<32>();
    if (warp == kTeamWarps)
      StreamW<kN8, false>(a, control, rings, strip0, block0, count, lane);
    else if (warp == kTeamWarps + 1)
      StreamW<kN8, true>(a, control, rings, strip0, block0, count, lane);
    else if (warp == kTeamWarps + 2)
      StreamX<kN8>(a, control + L::kX, x_ring, group, block0, count, lane);
    return;
  }

  if (kTrade) ptx::RaiseRegisters<112>();
  if (warp >= a.warps) return;

  const int team = warp >> 1, half = warp & 1;
  const uint32_t scratch = control + L::kScratches + team * kScratchBytes;
  const uint32_t value_ring = rings + team * L::kValueRing;
  const uint32_t index_ring = rings + teams * L::kValueRing + team * L::kIndexRing;
  const uint32_t value_full = control + team * 2 * L::kStream;
  const uint32_t index_full = value_full + L::kStream;
  const uint32_t used = control + L::kUsed + warp * 4;  // of values by warp 0, of index by warp 1

  // ---- the sizes of a segment's blocks: lane l has those of block l % kSegment ----
  int strip = strip0, block = block0, begin = block0, ordinal = 0;
  uint2 first, last;  // offsets of the segment to come: asked for a segment ahead
  int shard;
  auto fetch = [&](int strip, int block, int left) {
    first = last = make_uint2(0, 0);
    const uint2* const o = left > 0 ? TeamOffsets(a, strip, block, team, &shard) : nullptr;
    if (!o) return;
    const int mine = min(max(lane - block % kSegment, 0), SegmentBlocks(a, block, left) - 1);
    first = __ldg(o + mine), last = __ldg(o + mine + 1);
  };
  fetch(strip, block, count);
  uint32_t lane_chunks = 0, lane_tails = 0;
  uint32_t value_at = 0, index_at = 0;        // vectors of the streams that are used up
  uint32_t value_ready = 0, index_ready = 0;  // stages that have arrived
  auto enter = [&](int left) {
    const int at = block % kSegment, n = SegmentBlocks(a, block, left);
    lane_chunks = last.x - first.x, lane_tails = last.y - first.y;
    const bool lies = lane_chunks > tiled_csl::kMaxChunks || lane_tails > tiled_csl::kMaxTail;
    const uint2 from = make_uint2(__shfl_sync(~0u, first.x, at), __shfl_sync(~0u, first.y, at));
    const uint2 to =
        make_uint2(__shfl_sync(~0u, last.x, at + n - 1), __shfl_sync(~0u, last.y, at + n - 1));
    const bool inside = Inside(a, from, to);
    if (__any_sync(~0u, lies) || !inside) {
      // Garbage. All that is loaded must be used up: by the first block.
      lane_chunks = inside && lane == at ? to.x - from.x : 0;
      lane_tails = inside && lane == at ? to.y - from.y : 0;
    }
    // As StreamW has cut it: a segment starts with a stage of its own.
    value_at = RoundUp(value_at, L::kValueStage), index_at = RoundUp(index_at, L::kIndexStage);
    if (lane == 0)
      ptx::StoreSharedRelease(used, half ? index_at / L::kIndexStage : value_at / L::kValueStage);
    if (inside && (from.x != to.x || from.y != to.y)) {
      const uint32_t values = shard * static_cast<uint32_t>(a.capacity) + from.x * kChunkVectors;
      const uint32_t words =
          shard * static_cast<uint32_t>(a.index_capacity) + from.x * kCodeVectors;
      value_at += (values + from.y) % L::kValueStage;
      index_at += (words + from.y) % L::kIndexStage;
    }
    const bool ends = block + n == a.blocks;
    fetch(strip + ends, ends ? 0 : block + n, left - n);
  };

  for (uint32_t i = lane + half * 32; i < kScratchBytes / 16; i += 64)
    ptx::ZeroShared128(scratch + i * 16);
  auto team_sync = [&] { ptx::NamedBarrier(team + 1, 64); };
  team_sync();

  // ---- scatter ----
  constexpr uint32_t kValueMask = L::kValueRing - 1;
  constexpr uint32_t kIndexMask = L::kIndexRing - 1;
  auto load_values = [&](uint32_t v) {
    const uint2 pairs = ptx::LoadShared64((v & kValueMask) | value_ring);
    return make_uint4(pairs.x, pairs.x >> 16, pairs.y, pairs.y >> 16);
  };
  auto load_codes = [&](uint32_t c) { return ptx::LoadShared32((c & kIndexMask) | index_ring); };
  const uint32_t list = scratch + lane * 4 + half * 2;  // where its entries start from
  const uint32_t limit = list + kRows * kRowBytes;
  // A lane's entries of a chunk. Steps are bytes of up to 15 rows; dp4a adds the first 1, 2, 3, 4
  // of them times the bytes of a row.
  uint32_t at;
  auto scatter = [&](const uint4& values, uint32_t codes) {
    static_assert(kRowBytes == 0x80);
    const uint32_t steps = codes >> half * 4 & 0x0f0f0f0fu;
    ptx::StoreShared16(__dp4a(steps, 0x00000080u, at), values.x);
    ptx::StoreShared16(__dp4a(steps, 0x00008080u, at), values.y);
    ptx::StoreShared16(__dp4a(steps, 0x00808080u, at), values.z);
    at = __dp4a(steps, 0x80808080u, at);
    ptx::StoreShared16(at, values.w);
    at = min(at, limit);  // garbage must stay in shared memory
  };
  // Two entries a lane at a time. Garbage must stay in the scratch.
  auto store = [&](uint32_t position, uint32_t value) {
    ptx::StoreShared16(scratch + min(position, (kRows + 1) * kLists - 1) * 2, value);
  };
  auto scatter_tail = [&](uint32_t chunks, uint32_t tails, bool zero) {
    const uint32_t p = (index_at + chunks * kCodeVectors) * 16;
    const uint32_t v = (value_at + chunks * kChunkVectors) * 16;
#pragma unroll 1
    for (uint32_t e = lane * 4 + half * 128; e < tails * 16; e += 256) {
      const uint32_t positions = load_codes(p + e);
      const uint32_t values = zero ? 0 : ptx::LoadShared32(((v + e) & kValueMask) | value_ring);
      store(positions & 0xffff, values);
      store(positions >> 16, values >> 16);
    }
  };

  // ---- mma ----
  float acc[kWarpBands][kN8][4] = {};
  int x_slot = 0;
  uint32_t x_parity = 0;
  auto multiply = [&](auto clear) {
    // The lane's 32 bytes of a token in 64 columns are its B fragments of four steps.
    const uint32_t x = x_ring + x_slot * L::kXBytes + (lane >> 2) * kTokenStride + (lane & 3) * 32;
    const uint32_t dense = scratch + kRowBytes + half * (kWarpBands * 4096) + lane * 16;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      if (block * 2 + tile >= a.tiles) break;  // what x has there is stale
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {  // of steps: they share 16 bytes of x
        uint4 w[2][kWarpBands];
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
          for (int band = 0; band < kWarpBands; ++band) {
            const uint32_t from = dense + band * 4096 + tile * 2048 + (pair * 2 + step) * 512;
            w[step][band] = ptx::LoadShared128(from);
            if (clear) ptx::ZeroShared128(from);
          }
#pragma unroll
        for (int n8 = 0; n8 < kN8; ++n8) {
          const uint4 b = ptx::LoadShared128(x + n8 * 8 * kTokenStride + tile * 128 + pair * 16);
#pragma unroll
          for (int step = 0; step < 2; ++step)
#pragma unroll
            for (int band = 0; band < kWarpBands; ++band) {
              const uint4& f = w[step][band];
              const uint32_t fragment[4] = {f.x, f.y, f.z, f.w};
              ptx::Mma<kBf16>(acc[band][n8], fragment, step ? b.z : b.x, step ? b.w : b.y);
            }
        }
      }
    }
    __syncwarp();
    if (Frees(lane)) ptx::BarrierArrive(control + L::kX + x_slot * 16 + 8);
    if (++x_slot == L::kXStages) x_slot = 0, x_parity ^= 1;
  };

  for (int i = 0; i < count; ++i) {
    if (i == 0 || block % kSegment == 0) enter(count - i);
    uint32_t chunks = __shfl_sync(~0u, lane_chunks, block % kSegment);
    uint32_t tails = __shfl_sync(~0u, lane_tails, block % kSegment);
    const bool undo =
        chunks <= std::min(kUndoChunks, L::kRoundChunks) && tails <= L::kRoundTails;  // one round

    at = list;
    uint32_t round_chunks, round_tails;
    do {
      round_chunks = min(chunks, L::kRoundChunks);
      round_tails = round_chunks == chunks ? min(tails, L::kRoundTails) : 0;
      chunks -= round_chunks, tails -= round_tails;
      const uint32_t value_end = value_at + round_chunks * kChunkVectors + round_tails;
      const uint32_t index_end = index_at + round_chunks * kCodeVectors + round_tails;
      for (; value_ready * L::kValueStage < value_end; ++value_ready)
        ptx::BarrierWait(value_full + value_ready % kStages * 8, value_ready / kStages & 1);
      for (; index_ready * L::kIndexStage < index_end; ++index_ready)
        ptx::BarrierWait(index_full + index_ready % kStages * 8, index_ready / kStages & 1);
      uint32_t v = value_at * 16 + half * 256 + lane * 8, c = index_at * 16 + lane * 4;
      uint4 value0 = load_values(v);
      uint32_t code0 = load_codes(c);
      uint32_t left = round_chunks;
      for (; left >= 2; left -= 2) {  // loads a chunk ahead
        const uint4 value1 = load_values(v + 512);
        const uint32_t code1 = load_codes(c + 128);
        scatter(value0, code0);
        value0 = load_values(v += 1024);
        code0 = load_codes(c += 256);
        scatter(value1, code1);
      }
      if (left) scatter(value0, code0);
      scatter_tail(round_chunks, round_tails, false);
      team_sync();
      if (!undo) value_at = value_end, index_at = index_end;
      if (lane == 0 && !(half && undo))
        ptx::StoreSharedRelease(used,
                                half ? index_end / L::kIndexStage : value_end / L::kValueStage);
    } while (chunks | tails);

    ptx::BarrierWait(control + L::kX + x_slot * 16, x_parity);
    if (undo) {
      multiply(std::false_type());
      team_sync();
      at = list;
      uint32_t c = index_at * 16 + lane * 4, codes = load_codes(c);
      for (uint32_t left = round_chunks; left; --left) {
        const uint32_t next = load_codes(c += 128);
        scatter(make_uint4(0, 0, 0, 0), codes);
        codes = next;
      }
      scatter_tail(round_chunks, round_tails, true);
      value_at += round_chunks * kChunkVectors + round_tails;
      index_at += round_chunks * kCodeVectors + round_tails;
      team_sync();
      if (half && lane == 0) ptx::StoreSharedRelease(used, index_at / L::kIndexStage);
    } else {
      multiply(std::true_type());
      team_sync();
    }

    const bool strip_ends = block + 1 == a.blocks;
    if (strip_ends || i + 1 == count) {
      ptx::WaitForPrevious();  // it has, or x were not here; what it wrote is seen from here on
      Flush(a, cta, group, strip, ordinal, begin, strip_ends, warp, lane, acc);
      ++ordinal;
      begin = 0;
    }
    block = strip_ends ? 0 : block + 1;
    strip += strip_ends;
  }
}

template <bool kBf16, typename F>
cudaError_t ForEachKernel(F f) {
  for (auto kernel : {TiledCslKernel<kBf16, 1>, TiledCslKernel<kBf16, 2>, TiledCslKernel<kBf16, 4>,
                      TiledCslKernel<kBf16, 8>})
    if (cudaError_t e = f(kernel)) return e;
  return cudaSuccess;
}

}  // namespace

cudaError_t InitializeTiledCsl() {
  int shared;
  if (cudaError_t e = MaxShared(&shared)) return e;
  auto raise = [&](auto kernel) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  };
  if (cudaError_t e = ForEachKernel<false>(raise)) return e;
  return ForEachKernel<true>(raise);
}

template <int kN8>
cudaError_t LaunchTiledCsl(cudaStream_t stream, const Args& a, bool bf16, bool overlap) {
  int shared;
  if (cudaError_t e = MaxShared(&shared)) return e;
  const int bytes = Layout<kN8>::Bytes(a.warps / 2);
  if (a.warps > 2 * kMaxTeams || bytes > shared) return cudaErrorInvalidValue;
  return Launch(stream, bf16 ? TiledCslKernel<true, kN8> : TiledCslKernel<false, kN8>,
                dim3(a.ctas, a.groups), kThreads, static_cast<size_t>(bytes), overlap, a);
}

cudaError_t TiledCslSpmm(cudaStream_t stream, const Args& a, bool bf16, bool overlap) {
  switch (a.group) {
    case 8:
      return LaunchTiledCsl<1>(stream, a, bf16, overlap);
    case 16:
      return LaunchTiledCsl<2>(stream, a, bf16, overlap);
    case 32:
      return LaunchTiledCsl<4>(stream, a, bf16, overlap);
    case 64:
      return LaunchTiledCsl<8>(stream, a, bf16, overlap);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace flashllm::cuda
