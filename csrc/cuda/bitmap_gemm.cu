// Bitmap main loop for more than 128 tokens: warps of their own decode W to shared memory, where
// warpgroups multiply it by x, which lies there too.
//
//   values   HBM ==bulk copies==> a ring a decoding warp, in stages of 2 KB, asked for by itself
//   masks    HBM --> registers, a block ahead --> shared memory, with where runs start
//   x        L2  ==bulk copies==> stages of 64 columns, for two CTAs of a cluster at once
//
//   decode     | the next tile's runs | stage free? | expand, store, the next tile's loads, twice |
//   multiply   | W and x there? | half of W to registers, wgmma started | the other half |
//
// A CTA has 128 rows, a band of 16 for each multiplying warp, and 256 tokens. A stage of W is their
// tiles of the same 64 columns. The two CTAs of a cluster share a strip of 256 rows: each fetches
// half of x for both.
//
// A strip's tokens are cut into groups of a.group. Strip and group together are one strip of the
// schedule, groups innermost. A share (a cluster's units) that starts inside of a strip leaves sums
// for the share that has the strip's start, whose last strip that is: it adds them in order of K.
// Shares count against the order in which CTAs start, so whoever is waited for runs or has run.
#include <cuda.h>

#define FLASHLLM_VALUE_STAGES 3
#include "bitmap_stream.cuh"
#include "wgmma.cuh"

namespace flashllm::cuda {
namespace {

constexpr int kCluster = 2;
constexpr int kDecoders = 8, kMultipliers = 8;  // warps of a CTA, a band of 16 rows each
constexpr int kThreads = (kDecoders + kMultipliers) * 32;
constexpr uint32_t kWStageBytes = kDecoders * kTileBytes;
constexpr int kTokens = 256;
[[maybe_unused]] constexpr int kN8 = kTokens / 8;
constexpr int kWStages = 4, kXStages = 3;
constexpr uint32_t kXStageBytes = kTokens * 128;
// Together what the kernel starts with, 128.
[[maybe_unused]] constexpr int kMultiplyRegisters = 176, kDecodeRegisters = 80;

// Shared memory: stages of x and of W; of each decoding warp a block's masks and the values before
// them, and its ring; sums' buffers; barriers. Masks that lie may send a lane's loads up to a tile
// past the end of its ring: that much lies behind.
constexpr uint32_t kScanBytes = 2 * kBlockMaskBytes, kRingBytes = kValueRingBytes + kRingTail;
[[maybe_unused]] constexpr uint32_t kWFullAt = 0, kWEmptyAt = kWFullAt + kWStages * 8,
                                    kXFullAt = kWEmptyAt + kWStages * 8,
                                    kXEmptyAt = kXFullAt + kXStages * 8,
                                    kValuesAt = kXEmptyAt + kXStages * 8;
constexpr uint32_t kBarrierBytes = (2 * kWStages + 2 * kXStages + kDecoders * kValueStages) * 8;
constexpr uint32_t kSharedBytes = kXStages * kXStageBytes + kWStages * kWStageBytes +
                                  kDecoders * (kScanBytes + kRingBytes) +
                                  kMultipliers * kBufferBytes + kBarrierBytes;
constexpr int kHopperBytes = 227 << 10;
static_assert(kSharedBytes <= kHopperBytes);
static_assert(kMultipliers * kBufferBytes >= kValueStageBytes);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A stage of a ring, and the parity of its round.
template <int kStages>
struct Slot {
  int at = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void Next() {
    if (++at == kStages) at = 0, parity ^= 1;
  }
};

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

struct Layout {
  uint32_t x, w, scans, rings, buffers, barriers;
  explicit __device__ __forceinline__ Layout(uint32_t shared) : x(shared) {
    w = x + kXStages * kXStageBytes;
    scans = w + kWStages * kWStageBytes;
    rings = scans + kDecoders * kScanBytes;
    buffers = rings + kDecoders * kRingBytes;
    barriers = buffers + kMultipliers * kBufferBytes;
  }
};

// ---- decode ----

// Where the runs of a block's four tiles start, a tile's words by eight lanes, four each: into
// shared memory, with the masks, go the values before each word in its tile, a byte a step.
// `starts` is of tile j in lane 8 j + 7: bytes of values before steps 1, 2, 3 and behind, 16 bits
// each.
__device__ __forceinline__ void ScanBlock(uint4 w, uint32_t to, int lane, uint32_t (&mask)[4],
                                          uint2& starts) {
  const uint32_t a = ptx::ByteCounts(w.x), b = ptx::ByteCounts(w.y), c = ptx::ByteCounts(w.z);
  const uint32_t all = a + b + c + ptx::ByteCounts(w.w);
  // Before these: at most 7 * 32 a byte.
  uint32_t before = ptx::AddFromLower<1, 8>(0, all);
  before = ptx::AddFromLower<1, 8>(before, before);
  before = ptx::AddFromLower<2, 8>(before, before);
  before = ptx::AddFromLower<4, 8>(before, before);
  const uint32_t even = (before & 0xff00ffu) + (all & 0xff00ffu);
  const uint32_t odd = (before >> 8 & 0xff00ffu) + (all >> 8 & 0xff00ffu);
  const uint32_t both = even + odd, half = both & 0xffffu;
  starts.x = 2 * ((even & 0xffffu) | half << 16);
  starts.y = 2 * ((half + (even >> 16)) | (half + (both >> 16)) << 16);
  __syncwarp();  // the last block's are read
  ptx::StoreShared128(to + lane * 16, w.x, w.y, w.z, w.w);
  ptx::StoreShared128(to + kBlockMaskBytes + lane * 16, before, before + a, before + a + b,
                      before + a + b + c);
  __syncwarp();
#pragma unroll
  for (int j = 0; j < 4; ++j) mask[j] = ptx::LoadShared32(to + j * 128 + lane * 4);
}

// Dot products, which the integer pipe has no part in, take numbers out of words.
__device__ __forceinline__ void FindRuns(uint32_t before, uint2 starts, int j, uint32_t& tile,
                                         uint32_t (&runs)[4]) {
  const uint32_t x = __shfl_sync(~0u, starts.x, 8 * j + 7),
                 y = __shfl_sync(~0u, starts.y, 8 * j + 7);
  runs[0] = __dp4a(before, 0x2u, tile);
  runs[1] = __dp4a(before, 0x200u, __dp2a_lo(x, 0x1u, tile));
  runs[2] = __dp4a(before, 0x20000u, __dp2a_lo(x, 0x100u, tile));
  runs[3] = __dp4a(before, 0x2000000u, __dp2a_lo(y, 0x1u, tile));
  tile = __dp2a_lo(y, 0x100u, tile);
}

// Of each of a mask's eight nibbles, a byte of half h for each: which bytes of its four values
// make its weight i. Absent ones take the place of the fourth value, where a zero is then.
struct Selectors {
  uint32_t of[2][4];
};

// First halves of tables for prmt, kept in registers.
struct Tables {
  uint32_t first = ptx::Keep(0x10761076u), second = ptx::Keep(0x32107676u),
           none = ptx::Keep(0x76767676u), third = ptx::Keep(0x54323210u),
           signs = ptx::Keep(0x80808080u), counts = ptx::Keep(0x04020200u);
};

__device__ __forceinline__ Selectors Select(const Tables& k, uint32_t mask) {
  Selectors s;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    // prmt as a table of eight bytes, looked up by the first three bits of four nibbles.
    const uint32_t nibbles = mask >> 16 * h, three = nibbles & 0x7777u;
    s.of[h][0] = ptx::Permute(k.first, k.first, three);
    s.of[h][1] = ptx::Permute(k.second, k.second, three);
    s.of[h][2] = ptx::Permute(k.none, 0x54323210u, three);
    // The fourth bit makes it the sign of a byte of the table.
    const uint32_t fourth = ptx::Permute(k.signs, k.signs, nibbles);
    s.of[h][3] = ptx::Permute(k.third, 0x76545432u, three) | (~fourth & 0x76767676u);
  }
  return s;
}

// Where the values of the second nibble of a mask's byte start, given where the first one's do.
// Where the values of the second nibble of a mask's byte start, given where the first one's do.
template <int kStep>
__device__ __forceinline__ uint32_t SecondNibble(const Tables& k, uint32_t mask, uint32_t run) {
  const uint32_t twice = ptx::Permute(k.counts, 0x06040402u, mask >> 16 * (kStep / 2) & 0x7777u);
  const uint32_t fourth = mask >> 2 & 0x02020202u;  // twice the fourth bits
  return __dp4a(fourth, 1u << 8 * kStep, __dp4a(twice, 1u << 16 * (kStep % 2), run));
}

// The words that hold a nibble's values, but of a fourth value itself.
template <int kNibble>
__device__ __forceinline__ void LoadWords(uint32_t full, uint32_t run, uint32_t (&words)[3]) {
  const uint32_t at = run & ~3u;
  words[0] = ptx::LoadShared32(at);
  words[1] = ptx::LoadShared32(at + 4);
  words[2] = 0;
  if (full & 1u << 4 * kNibble) words[2] = ptx::LoadShared16(run + 6);
}

// A nibble's weights, two a register.
template <int kNibble>
__device__ __forceinline__ uint2 Expand(const Selectors& s, uint32_t run,
                                        const uint32_t (&words)[3]) {
  const uint32_t odd = run & 2;
  const uint32_t lo = __funnelshift_r(words[0], words[1], odd * 8);
  const uint32_t hi = ptx::Permute(words[1], words[2], odd * 0x11 + 0x5410);
  constexpr uint32_t kPick = (kNibble % 4) * 0x11 + 0x40;
  const auto& of = s.of[kNibble / 4];
  return make_uint2(ptx::Permute(lo, hi, ptx::Permute(of[0], of[1], kPick)),
                    ptx::Permute(lo, hi, ptx::Permute(of[2], of[3], kPick)));
}

// A stage of W: a tile each of eight bands, one k-step of 16 columns after another, operand A of
// mma.m16n8k16 by lanes (g, t). Its 16 bytes lie at line g / 2 * 4 + step of 128 bytes, place
// g % 2 * 4 + (step ^ t): neither the lanes that have a step, as they decode it, nor those that
// multiply it collide.
__device__ __forceinline__ void Decode(const Args& a, const CUtensorMap* map, const Layout& l,
                                       Work work, int rank, int warp, int lane) {
  const uint32_t ring = ptx::Keep(l.rings + warp * kRingBytes);
  const uint32_t scan = ptx::Keep(l.scans + warp * kScanBytes);
  const uint32_t full = l.barriers + kValuesAt + warp * kValueStages * 8;
  const int count = work.count, place = work.place + warp;
  int strip = work.strip, block = work.block, band = BandAt(a, strip, place);
  Range range = LoadRange(a, band, block, min(count, a.blocks - block));
  if (warp == 0) {
    if (lane < kXStages) {
      ptx::BarrierInit(l.barriers + kXFullAt + lane * 8, 1);
      ptx::BarrierInit(l.barriers + kXEmptyAt + lane * 8, kMultipliers * kCluster);
    }
    if (lane < kWStages) {
      ptx::BarrierInit(l.barriers + kWFullAt + lane * 8, kDecoders * kArrivals);
      ptx::BarrierInit(l.barriers + kWEmptyAt + lane * 8, kMultipliers * kArrivals);
    }
  }
  if (lane < kValueStages) ptx::BarrierInit(full + lane * 8, 1);
  ptx::FenceBarrierInit();
  __syncwarp();
  ptx::ClusterArrive();

  // ---- masks: a block ahead in registers ----
  int mask_strip = strip, mask_block = block, mask_tiles = 0;
  const uint4* mask_from = nullptr;
  auto find_masks = [&] {
    const int b = BandAt(a, mask_strip, place);
    mask_tiles = b < a.bands ? a.tiles : 0;
    mask_from = reinterpret_cast<const uint4*>(a.index) +
                (int64_t(b) * a.tiles + mask_block * kBlockTiles) * 8 + lane;
  };
  auto load_masks = [&] {
    const uint4 w =
        ptx::LoadOnceOrZero(mask_block * kBlockTiles + lane / 8 < mask_tiles, mask_from);
    mask_from += kBlockTiles * 8;
    if (++mask_block == a.blocks) mask_block = 0, ++mask_strip, find_masks();
    return w;
  };
  find_masks();
  uint4 words_next = load_masks();

  // ---- values: a stream of stages, asked for by this warp itself ----
  // It goes on with the next strip, whose range is `range` by then, before the last one is decoded.
  const uint8_t* from = nullptr;
  uint32_t rest = 0;  // vectors
  int under_way = 0;  // stages asked for and not waited for
  uint32_t ask = 0, take_at = 0, parity = 0;
  bool ahead = false;
  auto fetch_strip = [&] {
    const Range r = Clamp(a, range);
    from = ValuesAt(a, band, r.first);
    rest = __shfl_sync(~0u, r.end - r.first, 0);
  };
  auto refill = [&](int most) {
    while (under_way < most) {
      if (__builtin_expect(rest == 0, 0)) {
        if (ahead) break;
        ahead = true;
        fetch_strip();
        if (rest == 0) break;
      }
      // Stages end at multiples of their length: no line of memory is fetched twice.
      const uint32_t phase = Phase(from), n = min(rest, kValueStageVectors - phase);
      if (ptx::Elect()) {
        const uint32_t to = ring + ask * kValueStageBytes + phase * 16, barrier = full + ask * 8;
        ptx::BarrierExpect(barrier, n * 16 + (ask == 0 ? kRingTail : 0));
        ptx::BulkCopyOnce(to, from, n * 16, barrier);
        if (ask == 0) ptx::BulkCopyOnce(ring + kValueRingBytes, from, kRingTail, barrier);
      }
      __syncwarp();
      from += n * 16;
      rest -= n;
      ++under_way;
      if (++ask == kValueStages) ask = 0;
    }
  };
  // Addresses count on past the end of the ring and fall back by its size when the stage at its
  // start is waited for. All lanes hold the same: landed up to `ready`, the strip's end `limit`.
  uint32_t ready = ring, limit = ring, origin = 0, tile, runs[4];
  bool started = false;
  auto wait_stage = [&] {
    if (__builtin_expect(under_way == 0, 0)) refill(1);  // only where offsets skip
    ptx::BarrierWait(full + take_at * 8, parity);
    const bool wraps = take_at == 0 && started;
    started = true;
    if (wraps) ready -= kValueRingBytes, limit -= kValueRingBytes, origin -= kValueRingBytes;
    ready += kValueStageBytes;
    --under_way;
    if (++take_at == kValueStages) take_at = 0, parity ^= 1;
    return wraps;
  };
  // Waits for the values of the tile whose runs these are. `tile` is its end.
  auto await = [&] {
    while (__any_sync(~0u, int(tile - ready) > 0)) {
      if (ready == limit) {  // masks that lie
        tile = limit;
        break;
      }
      if (!wait_stage()) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (int(runs[i] - (ring + kValueRingBytes)) >= 0) runs[i] -= kValueRingBytes;
      tile -= kValueRingBytes;
    }
  };
  const uint32_t* offset = nullptr;  // where the block ends
  int left = count;                  // blocks behind this strip
  // Enters the strip of `range`, at `limit`, and looks for the next one's.
  auto enter = [&] {
    if (!ahead) fetch_strip();
    ahead = false;
    const Range r = {__shfl_sync(~0u, Clamp(a, range).first, 0),
                     __shfl_sync(~0u, Clamp(a, range).end, 0)};
    const uint32_t phase = __shfl_sync(~0u, Phase(ValuesAt(a, band, r.first)), 0);
    tile = limit + phase * 16;
    origin = tile - r.first * 16;
    const uint32_t vectors = r.end - r.first;
    if (vectors)
      limit += (phase + vectors + kValueStageVectors - 1) / kValueStageVectors * kValueStageBytes;
    else
      tile = limit;
    const int at = min(band, a.bands - 1);
    offset = a.offsets + int64_t(at / a.shard_bands) * a.shard_offsets +
             int64_t(at % a.shard_bands) * a.blocks + 1 + block;
    left -= min(left, a.blocks - block);
    band = BandAt(a, strip + 1, place);
    range = LoadRange(a, band, 0, min(left, a.blocks));
  };
  enter();
  refill(kFirstStages);

  uint32_t block_masks[4];
  uint2 starts;
  ScanBlock(words_next, scan, lane, block_masks, starts);
  words_next = load_masks();
  FindRuns(ptx::LoadShared32(scan + kBlockMaskBytes + lane * 4), starts, 0, tile, runs);
  await();
  const Tables tables;
  uint32_t at[8], words[8][3], filled;
  auto take = [&](auto step, uint32_t mask) {
    constexpr int s = decltype(step)::value;
    at[2 * s] = runs[s];
    at[2 * s + 1] = SecondNibble<s>(tables, mask, runs[s]);
    LoadWords<2 * s>(filled, at[2 * s], words[2 * s]);
    LoadWords<2 * s + 1>(filled, at[2 * s + 1], words[2 * s + 1]);
  };
  auto find = [&](uint32_t mask) {
    filled = mask & mask >> 1;
    filled &= filled >> 2;
  };
  find(block_masks[0]);
  take(Constant<0>(), block_masks[0]), take(Constant<2>(), block_masks[0]);
  take(Constant<1>(), block_masks[0]), take(Constant<3>(), block_masks[0]);

  // The lane's weights are of step t.
  const int g = lane >> 2, t = lane & 3;
  const uint32_t to =
      ptx::Keep(l.w + warp * kTileBytes + ((g >> 1) * 4 + t) * 128 + (g & 1) * 64 + t * 16);
  ptx::ClusterWait();
  ptx::WaitForPrevious();  // weights depend on nothing before this kernel; x does
  Slot<kWStages> slot;
  Slot<kXStages> x_slot;
  for (int i = 0; i < count; ++i) {
    const bool strip_ends = block + 1 == a.blocks, last = i + 1 == count;
    const uint32_t block_end = __ldg(offset++);
#pragma unroll
    for (int j = 0; j < kBlockTiles; ++j) {
      const uint32_t mask = block_masks[j];
      // ---- x, by the warps in turn: half of a stage to both CTAs ----
      if (warp == i % 2 * 4 + j) {
        constexpr int kPart = kTokens / kCluster;
        const uint32_t x_full = l.barriers + kXFullAt + x_slot.at * 8;
        // What this stage held last another warp asked for: until it is there, parities would
        // mean a round before.
        ptx::BarrierWait(x_full, x_slot.parity ^ 1);
        ptx::BarrierWait(l.barriers + kXEmptyAt + x_slot.at * 8, x_slot.parity ^ 1);
        if (ptx::Elect()) {
          ptx::BarrierExpect(x_full, kXStageBytes);
          ptx::TileCopyMulticast(l.x + x_slot.at * kXStageBytes + rank * kPart * 128, map,
                                 (block * kBlockTiles + j) * 64,
                                 strip % a.strip_groups * kTokens + rank * kPart, x_full,
                                 (1 << kCluster) - 1);
        }
        __syncwarp();
      }
      x_slot.Next();

      // ---- the next tile's runs ----
      uint32_t before;
      if (j == kBlockTiles - 1) {
        if (strip_ends || last) {
          while (ready != limit) wait_stage();  // what offsets skip
          block = -1, ++strip;
          if (!last) block = 0, enter(), block = -1;
        } else {
          // Blocks start on 16 bytes, or where offsets say; unless they lie.
          const uint32_t next = origin + __shfl_sync(~0u, block_end, 0) * 16;
          if (next - tile <= limit - tile) tile = next;
        }
        ++block;
        ScanBlock(words_next, scan, lane, block_masks, starts);
        words_next = load_masks();
      }
      before = ptx::LoadShared32(scan + kBlockMaskBytes + (j + 1) % kBlockTiles * 128 + lane * 4);
      if (j < kBlockTiles - 1 || !last) {
        FindRuns(before, starts, (j + 1) % kBlockTiles, tile, runs);
        await();
      }
      // Of the last tile nothing is next, and what is loaded is not used.
      const uint32_t mask_next = block_masks[(j + 1) % kBlockTiles];
      find(mask_next);

      // ---- this one ----
      const Selectors s = Select(tables, mask);
      const uint32_t where = to + slot.at * kWStageBytes;
      ptx::BarrierWait(l.barriers + kWEmptyAt + slot.at * 8, slot.parity ^ 1);
      auto put = [&](auto first) {
        constexpr int f = 2 * decltype(first)::value;  // steps f / 2 and f / 2 + 2
        const uint2 e0 = Expand<f>(s, at[f], words[f]),
                    e1 = Expand<f + 1>(s, at[f + 1], words[f + 1]),
                    e2 = Expand<f + 4>(s, at[f + 4], words[f + 4]),
                    e3 = Expand<f + 5>(s, at[f + 5], words[f + 5]);
        ptx::StoreShared128(where ^ f * 16, e0.x, e1.x, e2.x, e3.x);
        ptx::StoreShared128(where ^ (f + 1) * 16, e0.y, e1.y, e2.y, e3.y);
      };
      put(Constant<0>());
      take(Constant<0>(), mask_next), take(Constant<2>(), mask_next);
      put(Constant<1>());
      take(Constant<1>(), mask_next), take(Constant<3>(), mask_next);
      __syncwarp();
      if (Frees(lane)) ptx::BarrierArrive(l.barriers + kWFullAt + slot.at * 8);
      slot.Next();
      // The next tile lies in the last two stages that were waited for.
      refill(kValueStages - 2);
    }
  }
}

// ---- sums of a strip that another share has the start of ----

__device__ __forceinline__ float4* PartialAt(const Args& a, int share, int place, int lane) {
  return reinterpret_cast<float4*>(a.partial) + PartialIndex(a, 0, share, 0, place, 0) + lane;
}

// ---- multiply ----

template <bool kBf16>
__device__ __forceinline__ void Multiply(const Args& a, const Layout& l, Work work, int share,
                                         int warp, int lane) {
  ptx::ClusterWait();
  const int place = work.place + warp, g = lane >> 2, t = lane & 3;
  const uint64_t x = ptx::Descriptor(l.x);
  const uint32_t from = ptx::Keep(l.w + warp * kTileBytes + (g >> 1) * 512 + (g & 1) * 64 + t * 16);
  const uint32_t buffer = l.buffers + warp * kBufferBytes;
  Slot<kWStages> w_slot;
  Slot<kXStages> x_slot;
  int strip = work.strip, begin = work.block;
  for (int left = work.count; left;) {
    const int blocks = min(left, a.blocks - begin);
    float acc[kN8][4] = {};
    uint32_t w[4][4];
    int x_last = 0;
    // Steps of 16 columns, the first two or the last two.
    auto fetch = [&](auto first, uint32_t here) {
      constexpr int s0 = decltype(first)::value;
#pragma unroll
      for (int s = s0; s < s0 + 2; ++s) {
        const uint4 v = ptx::LoadShared128((here ^ s * 16) + s * 128);
        w[s][0] = v.x, w[s][1] = v.y, w[s][2] = v.z, w[s][3] = v.w;
      }
    };
    auto start = [&](auto first) {
      constexpr int s0 = decltype(first)::value;
      ptx::WgmmaFence();
#pragma unroll
      for (int s = s0; s < s0 + 2; ++s)
#pragma unroll
        for (int h = 0; h < kN8 / 16; ++h)
          ptx::Wgmma<kBf16>(reinterpret_cast<float (&)[16][4]>(acc[h * 16]), w[s],
                            x + x_slot.at * (kXStageBytes >> 4) + 2 * s + h * 1024);
      ptx::WgmmaCommit();
    };
    for (int i = 0; i < blocks * kBlockTiles; ++i) {
      ptx::BarrierWait(l.barriers + kWFullAt + w_slot.at * 8, w_slot.parity);
      const uint32_t here = from + w_slot.at * kWStageBytes;
      ptx::WgmmaWaitAllBut<1>();
      fetch(Constant<0>(), here);
      ptx::BarrierWait(l.barriers + kXFullAt + x_slot.at * 8, x_slot.parity);
      start(Constant<0>());
      ptx::WgmmaWaitAllBut<1>();
      if (i && lane < kCluster) ptx::BarrierArriveAt(l.barriers + kXEmptyAt + x_last * 8, lane);
      fetch(Constant<2>(), here);
      __syncwarp();
      if (Frees(lane)) ptx::BarrierArrive(l.barriers + kWEmptyAt + w_slot.at * 8);
      start(Constant<2>());
      x_last = x_slot.at;
      w_slot.Next(), x_slot.Next();
    }
    ptx::WgmmaWait(acc);
    if (lane < kCluster) ptx::BarrierArriveAt(l.barriers + kXEmptyAt + x_last * 8, lane);

    // ---- the segment's end ----
    ptx::WaitForPrevious();  // it has, or x were not here; what it wrote is seen from here on
    if (begin) {
      float4* const to = PartialAt(a, share, place, lane);
#pragma unroll
      for (int n8 = 0; n8 < kN8; ++n8)
        to[n8 * 32] = make_float4(acc[n8][0], acc[n8][1], acc[n8][2], acc[n8][3]);
      __threadfence();
      __syncwarp();
      if (lane == 0) ptx::StoreRelease(a.flags + share * a.warps + place, 1);
    } else {
      if (blocks != a.blocks) {
        const int last = CtaOf(a, (strip + 1) * a.blocks - 1);
        for (int c = share + 1; c <= last; ++c) {
          while (ptx::LoadAcquire(a.flags + c * a.warps + place) == 0) ptx::Sleep(kPollNs);
          __syncwarp();
          const float4* const from = PartialAt(a, c, place, lane);
#pragma unroll
          for (int n8 = 0; n8 < kN8; ++n8) {
            const float4 v = __ldcg(from + n8 * 32);
            acc[n8][0] += v.x, acc[n8][1] += v.y, acc[n8][2] += v.z, acc[n8][3] += v.w;
          }
        }
      }
      StoreSums(a, BandOf(a, BandAt(a, strip, place)), strip % a.strip_groups * kTokens, lane,
                buffer, acc);
    }
    left -= blocks, begin = 0, ++strip;
  }
}
#endif

template <bool kBf16>
__global__ void __launch_bounds__(kThreads, 1)
    GemmKernel(const __grid_constant__ Args a, const __grid_constant__ CUtensorMap x) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t shared[];
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = ptx::Keep(threadIdx.x & 31);
  const int rank = ptx::ClusterRank();
  const int share = a.ctas - 1 - static_cast<int>(blockIdx.x) / kCluster;
  const uint32_t base = ptx::Keep(ptx::SharedAddress(shared));
  // Each role finds these anew, or what it does not need costs it registers.
  auto layout = [&] { return Layout(base); };
  auto work = [&] {
    // Shuffles tell the compiler what all lanes have in common.
    const int unit0 = __shfl_sync(~0u, FirstUnit(a, share), 0);
    const int count = __shfl_sync(~0u, FirstUnit(a, share + 1) - unit0, 0);
    const int strip = __shfl_sync(~0u, unit0 / a.blocks, 0);
    return Work{strip, unit0 - strip * a.blocks, count, kDecoders, rank * kDecoders};
  };
  ptx::LaunchDependents();
  if (warp < kMultipliers) {
    ptx::RaiseRegisters<kMultiplyRegisters>();
    ptx::ClusterArrive();
    Multiply<kBf16>(a, layout(), work(), share, warp, lane);
    // The other CTA may still free its x here.
    __syncwarp();
    ptx::ClusterArrive(), ptx::ClusterWait();
  } else {
    ptx::LowerRegisters<kDecodeRegisters>();
    Decode(a, &x, layout(), work(), rank, warp - kMultipliers, lane);
    __syncwarp();
    ptx::ClusterArrive(), ptx::ClusterWait();
  }
#else
  __trap();  // only sm_90a has wgmma: Initialize says whether this code is
#endif
}

__global__ void ClearFlags(uint32_t* flags, int count) {
  ptx::LaunchDependents();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) flags[i] = 0;
}

// x in boxes of 64 columns and a CTA's part of the tokens, swizzled as wgmma has them.
cudaError_t MapTokens(const Args& a, CUtensorMap* map) {
  static const auto encode = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault,
                                         &found) ||
        found != cudaDriverEntryPointSuccess)
      f = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(f);
  }();
  if (!encode) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(a.x_stride),
                               static_cast<cuuint64_t>(a.tokens)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(a.x_stride) * 2};
  const cuuint32_t boxes[2] = {64, kTokens / kCluster}, steps[2] = {1, 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<uint16_t*>(a.x), sizes, strides,
                boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
             ? cudaErrorInvalidValue
             : cudaSuccess;
}

}  // namespace

cudaError_t InitializeBitmapGemm() {
  int shared;
  if (cudaError_t e = MaxShared(&shared)) return e;
  if (shared < kHopperBytes) return cudaSuccess;  // where it is never launched
  for (auto kernel : {GemmKernel<false>, GemmKernel<true>})
    if (cudaError_t e =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes))
      return e;
  return cudaSuccess;
}

cudaError_t BitmapGemm(cudaStream_t stream, const Args& a, bool bf16) {
  if (a.warps != kDecoders * kCluster || a.group != kTokens) return cudaErrorInvalidValue;
  CUtensorMap map;
  if (cudaError_t e = MapTokens(a, &map)) return e;
  const int flags = a.ctas * a.warps;
  if (cudaError_t e = Launch(stream, ClearFlags, dim3(static_cast<unsigned>(CeilDiv(flags, 256))),
                             256, 0, false, a.flags, flags))
    return e;
  return LaunchClusters(stream, kCluster, bf16 ? GemmKernel<true> : GemmKernel<false>,
                        dim3(a.ctas * kCluster), kThreads, kSharedBytes, true, a, map);
}

}  // namespace flashllm::cuda
