// Tiled-CSL main loop: every warp streams its own strip of 64 rows, scatters a block's nonzeros
// into a dense block in shared memory, and reads that back as mma fragments.
//
//   warp w of a CTA   rows 64 (strip * warps + w) .., the strip's blocks of 128 columns in turn
//
//   values, codes, tails   HBM ==bulk copies==> a ring of shared memory that only this warp uses
//   x                      L1: the warps of a CTA go through K side by side; loaded a block ahead
//                          of its use, before the scatter
//
//   block   | a piece: wait | scatter its chunks | its tail | next piece ... |
//           | 32 loads = A fragments of m64 x k128, 32 mma a token octet | undo or clear | refill |
//
// Work follows the nonzeros: a lane walks the two lists of its bank, and one dp4a turns four
// 4-bit steps into an address, prefix sum included, for one store without bank conflicts.
//
// A block of few chunks is undone, by the same addresses again with zeros. Others are cleared as
// they are read, which sets a piece's room in the ring free as soon as it is scattered.
#include <algorithm>
#include <type_traits>

#include "../tiled_csl.h"
#include "ring.cuh"
#include "strips.cuh"
#include "tiled_csl_block.cuh"

namespace flashllm::cuda {
namespace {

using tiled_csl::kLists;
using tiled_csl::kRows;

constexpr int kMaxWarps = 8;
constexpr int kBands = tiled_csl::kBlockRows / 16;
constexpr int kRowBytes = kLists * 2;
constexpr int kScratchBytes = (kRows + 1) * kRowBytes;
constexpr int kChunkVectors = tiled_csl::kChunkValues / 8;  // of 16 bytes
constexpr int kCodeVectors = tiled_csl::kChunkWords / 4;
constexpr int kPieceChunks = 8;
constexpr int kPieceTails = 32;  // vectors
constexpr int kUndoChunks = 5;   // at 7 undoing takes a tenth longer than clearing
constexpr int kPieceBytes = (kPieceChunks * (kChunkVectors + kCodeVectors) + kPieceTails * 2) * 16;
constexpr int kControlBytes = kMaxWarps * kSlots * (8 + 4);  // mbarriers, what is in the slots
// Codes that lie (garbage) lead a lane past its scratch by this much, into rings at worst.
constexpr int kOvershoot = tiled_csl::kChunkEntries * tiled_csl::kFiller * kRowBytes;
// The loop loads a chunk ahead.
constexpr int kTailBytes = (kChunkVectors + kCodeVectors) * 16;

// What a slot of the ring holds, in a word: where it starts, its chunks, vectors of its tail,
// whether the block ends here, and whether it also began here.
struct Piece {
  uint32_t word;
  __device__ static uint32_t Pack(uint32_t start, uint32_t chunks, uint32_t tails, bool last,
                                  bool whole) {
    return start >> 4 | chunks << 12 | tails << 16 | uint32_t(last) << 22 | uint32_t(whole) << 23;
  }
  __device__ uint32_t start() const { return (word & 0xfff) << 4; }
  __device__ uint32_t chunks() const { return word >> 12 & 0xf; }
  __device__ uint32_t tails() const { return word >> 16 & 0x3f; }
  __device__ bool last() const { return word >> 22 & 1; }
  __device__ bool whole() const { return word >> 23 & 1; }
};
constexpr uint32_t kMaxRing = 0x1000 << 4;
static_assert(kPieceChunks < 16 && kPieceTails < 64);

// Where a lane is in the lists of its bank: byte addresses of their last entries.
struct Lists {
  uint32_t low, high;
};

// A chunk's entries of a lane. Steps are bytes of up to 15 rows; dp4a adds the first 1, 2, 3, 4
// of them times the bytes of a row.
__device__ __forceinline__ void ScatterChunk(Lists& at, const uint4& values, uint32_t codes,
                                             uint32_t limit) {
  const uint32_t low = codes & 0x0f0f0f0fu, high = codes >> 4 & 0x0f0f0f0fu;
  static_assert(kRowBytes == 0x80);
  ptx::StoreShared16(__dp4a(low, 0x00000080u, at.low), values.x);
  ptx::StoreShared16(__dp4a(high, 0x00000080u, at.high), values.x >> 16);
  ptx::StoreShared16(__dp4a(low, 0x00008080u, at.low), values.y);
  ptx::StoreShared16(__dp4a(high, 0x00008080u, at.high), values.y >> 16);
  ptx::StoreShared16(__dp4a(low, 0x00808080u, at.low), values.z);
  ptx::StoreShared16(__dp4a(high, 0x00808080u, at.high), values.z >> 16);
  at.low = __dp4a(low, 0x80808080u, at.low);
  at.high = __dp4a(high, 0x80808080u, at.high);
  ptx::StoreShared16(at.low, values.w);
  ptx::StoreShared16(at.high, values.w >> 16);
  at.low = min(at.low, limit);  // garbage must stay in shared memory
  at.high = min(at.high, limit);
}

template <bool kBf16, int kN8>
__global__ void __launch_bounds__(kMaxWarps * 32, 1)
    TiledCslKernel(const __grid_constant__ Args a) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = blockIdx.y;
  const int cta = CtaIndex(a);
  const int64_t unit0 = FirstUnit(a, cta);
  const int count = static_cast<int>(FirstUnit(a, cta + 1) - unit0);
  ptx::LaunchDependents();
  if (count == 0) return;

  const uint32_t control = ptx::SharedAddress(shared), scratches = control + kControlBytes;
  const uint32_t pieces = control + kMaxWarps * kSlots * 8 + warp * kSlots * 4;
  const uint32_t scratch = scratches + warp * kScratchBytes;
  Ring ring;
  ring.bytes = a.ring_bytes;
  ring.barriers = control + warp * kSlots * 8;
  ring.base = scratches + a.warps * kScratchBytes + warp * a.ring_bytes;
  if (lane < kSlots) {
#if __CUDA_ARCH__ >= 900
    ptx::BarrierInit(ring.barriers + lane * 8, 1);
#else
    ptx::BarrierInit(ring.barriers + lane * 8, 32);
#endif
  }
  ptx::FenceBarrierInit();
  __syncwarp();

  // ---- load: lane 0 knows what comes, as far ahead as the ring holds ----
  const int strip0 = static_cast<int>(unit0 / a.blocks);
  const int block0 = static_cast<int>(unit0 % a.blocks);
  const int shard_strips = a.shard_bands / kBands;
  int ahead_strip = strip0, ahead_block = block0, ahead_shard;
  const uint32_t* row_offsets;  // of the strip ahead; none: it lies behind W
  auto enter_strip = [&] {
    const int rows = ahead_strip * a.warps + warp;  // in strips of one warp
    ahead_shard = rows / shard_strips;
    row_offsets = rows * kBands < a.bands ? a.offsets + int64_t(ahead_shard) * a.shard_offsets +
                                                int64_t(rows % shard_strips) * a.blocks * 2
                                          : nullptr;
  };
  auto load_offsets = [&] {
    return row_offsets ? LoadOffsets(row_offsets + ahead_block * 2) : make_uint4(0, 0, 0, 0);
  };
  enter_strip();
  uint4 offsets = load_offsets();  // of the block to come
  int entered = 0;                 // blocks
  CslBlock rest = {};              // of the block that is being issued
  bool first = true;
  auto enter = [&] {
    rest = LocateBlock(a.index, offsets, a.index_capacity, a.capacity, ahead_shard);
    first = true;
    if (++ahead_block == a.blocks) {
      ahead_block = 0;
      ++ahead_strip;
      enter_strip();
    }
    if (++entered < count) offsets = load_offsets();
  };
  enter();
  bool done = false;
  // Claims room for the next piece. Vectors of 16 bytes: values, then codes and positions.
  struct Copy {
    uint32_t to, barrier, values, indices;
    const uint16_t* value;
    const uint32_t* index;
  };
  auto next_piece = [&](Copy* copy) {
    if (done) return false;
    const uint32_t chunks = min(rest.chunks, kPieceChunks);
    const uint32_t tails = rest.chunks <= kPieceChunks ? min(rest.tails, kPieceTails) : 0;
    const bool last = rest.chunks <= kPieceChunks && rest.tails <= kPieceTails;
    const uint32_t values = chunks * kChunkVectors + tails, indices = chunks * kCodeVectors + tails;
    uint32_t start;
    if (!ring.Claim((values + indices) * 16, &start)) return false;
    const int slot = ring.issued++ % kSlots;
    ptx::StoreShared32(pieces + slot * 4, Piece::Pack(start, chunks, tails, last, first && last));
    *copy = {ring.base + start, ring.barriers + slot * 8, values,
             indices,           a.values + rest.value,    rest.index};
    rest.value += values * 8, rest.index += indices * 4;
    rest.chunks -= chunks, rest.tails -= tails;
    first = false;
    if (last) {
      done = entered == count;
      if (!done) enter();
    }
    return true;
  };
  auto refill = [&] {
    Copy c = {};
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
      while (next_piece(&c)) {
        ptx::BarrierExpect(c.barrier, (c.values + c.indices) * 16);
        if (c.values == 0) continue;
        ptx::BulkCopy(c.to, c.value, c.values * 16, c.barrier);
        ptx::BulkCopy(c.to + c.values * 16, c.index, c.indices * 16, c.barrier);
      }
    }
    __syncwarp();
#else
    while (next_piece(&c)) {  // all lanes, alike
      for (uint32_t v = lane; v < c.values; v += 32)
        ptx::CopyAsync16(c.to + v * 16, c.value + v * 8);
      for (uint32_t v = lane; v < c.indices; v += 32)
        ptx::CopyAsync16(c.to + (c.values + v) * 16, c.index + v * 4);
      ptx::CopyAsyncArrive(c.barrier);
    }
    __syncwarp();
#endif
  };
  auto release = [&] {  // the oldest piece, which every lane has read
    ++ring.taken;
    ring.tail = Piece{ptx::LoadShared32(pieces + ring.taken % kSlots * 4)}.start();
    refill();
  };

  refill();
  for (uint32_t i = lane * 16; i < kScratchBytes; i += 512) ptx::ZeroShared128(scratch + i);
  __syncwarp();
  ptx::WaitForPrevious();  // weights depend on nothing before this kernel; x may

  float acc[kBands][kN8][4] = {};
  // The lane's 32 bytes of a token in 64 columns are its B fragments of four steps.
  const int token = group * kN8 * 8 + (lane >> 2);
  const uint16_t* const x_lane = a.x + token * a.x_stride + (lane & 3) * 16;
  const uint16_t* x_block = x_lane + block0 * tiled_csl::kBlockCols;
  int strip = strip0, block = block0, segment = block0, ordinal = 0;

  // Two steps of x at a time. Up to 32 tokens all of the block's wait in registers.
  constexpr int kAhead = kN8 <= 4 ? 4 : 1;
  uint4 x[kAhead][kN8];
  auto load_x = [&](int quarter, uint4(&to)[kN8]) {
    const bool inside = block * 2 + quarter / 2 < a.tiles;
    const uint16_t* p = x_block + quarter / 2 * 64 + quarter % 2 * 8;
#pragma unroll
    for (int n8 = 0; n8 < kN8; ++n8, p += 8 * a.x_stride) {
      to[n8] = make_uint4(0, 0, 0, 0);
      if (inside && token + n8 * 8 < a.tokens) to[n8] = ptx::LoadCached16(p);
    }
  };

  const uint32_t limit = scratch + kRows * kRowBytes + lane * 4;
  for (int i = 0; i < count; ++i) {
#pragma unroll
    for (int quarter = 0; quarter < kAhead; ++quarter) load_x(quarter, x[quarter]);

    // ---- scatter ----
    Lists at = {scratch + lane * 4, scratch + lane * 4 + 2};
    Piece piece;
    uint32_t values, codes, chunks, tails;
    bool undo;
    auto scatter_tail = [&](bool zero) {
      const uint32_t positions = codes + chunks * kCodeVectors * 16;
      for (uint32_t e = lane; e < tails * 8; e += 32) {
        // Garbage must stay in the scratch.
        const uint32_t position =
            min(ptx::LoadShared16(positions + e * 2), (kRows + 1) * kLists - 1);
        const uint32_t value =
            zero ? 0 : ptx::LoadShared16(values + chunks * kChunkVectors * 16 + e * 2);
        ptx::StoreShared16(scratch + position * 2, value);
      }
    };
    do {
      const int slot = ring.taken % kSlots;
      ptx::BarrierWait(ring.barriers + slot * 8, (ring.taken / kSlots) & 1);
      piece.word = ptx::LoadShared32(pieces + slot * 4);
      chunks = piece.chunks(), tails = piece.tails();
      undo = piece.whole() && chunks <= kUndoChunks;
      values = ring.base + piece.start();
      codes = values + (chunks * kChunkVectors + tails) * 16;
      uint32_t v = values + lane * 16, c = codes + lane * 4;
      uint4 value0 = ptx::LoadShared128(v);
      uint32_t code0 = ptx::LoadShared32(c);
      uint32_t left = chunks;
      for (; left >= 2; left -= 2) {
        const uint4 value1 = ptx::LoadShared128(v + 512);
        const uint32_t code1 = ptx::LoadShared32(c + 128);
        ScatterChunk(at, value0, code0, limit);
        value0 = ptx::LoadShared128(v += 1024);
        code0 = ptx::LoadShared32(c += 256);
        ScatterChunk(at, value1, code1, limit);
      }
      if (left) ScatterChunk(at, value0, code0, limit);
      scatter_tail(false);
      __syncwarp();
      if (!undo) release();
    } while (!piece.last());

    // ---- mma ----
    const uint32_t dense = scratch + kRowBytes + lane * 16;
    auto multiply = [&](auto clear) {
#pragma unroll
      for (int step = 0; step < 8; ++step) {
        const int quarter = step / 2;
        if (kAhead == 1 && step % 2 == 0 && step) load_x(quarter, x[0]);
        uint4 w[kBands];
#pragma unroll
        for (int band = 0; band < kBands; ++band) {
          const uint32_t from = dense + (band * 2 + step / 4) * 2048 + step % 4 * 512;
          w[band] = ptx::LoadShared128(from);
          if (clear) ptx::ZeroShared128(from);
        }
#pragma unroll
        for (int n8 = 0; n8 < kN8; ++n8) {
          const uint4 b = x[kAhead == 1 ? 0 : quarter][n8];
#pragma unroll
          for (int band = 0; band < kBands; ++band) {
            const uint32_t fragment[4] = {w[band].x, w[band].y, w[band].z, w[band].w};
            ptx::Mma<kBf16>(acc[band][n8], fragment, step % 2 ? b.z : b.x, step % 2 ? b.w : b.y);
          }
        }
      }
    };
    if (undo) {
      multiply(std::false_type());
      __syncwarp();
      Lists back = {scratch + lane * 4, scratch + lane * 4 + 2};
      uint32_t c = codes + lane * 4, code = ptx::LoadShared32(c);
      for (uint32_t left = chunks; left; --left) {
        const uint32_t next = ptx::LoadShared32(c += 128);
        ScatterChunk(back, make_uint4(0, 0, 0, 0), code, limit);
        code = next;
      }
      scatter_tail(true);
      __syncwarp();
      release();
    } else {
      multiply(std::true_type());
      __syncwarp();
    }

    const bool strip_ends = block + 1 == a.blocks;
    if (strip_ends || i + 1 == count) {
      Flush(a, cta, group, strip, ordinal, segment, strip_ends, warp, lane, acc);
      ++ordinal;
      segment = 0;
    }
    block = strip_ends ? 0 : block + 1;
    x_block = strip_ends ? x_lane : x_block + tiled_csl::kBlockCols;
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

cudaError_t TiledCslSpmm(cudaStream_t stream, const Args& args, bool bf16, bool overlap) {
  Args a = args;
  int shared;
  if (cudaError_t e = MaxShared(&shared)) return e;
  const int room = (shared - kControlBytes - kTailBytes) / a.warps - kScratchBytes;
  a.ring_bytes = static_cast<int>(std::min<int64_t>(room / kRingAlign * kRingAlign, kMaxRing));
  if (a.warps > kMaxWarps || a.ring_bytes < kPieceBytes ||
      a.warps * a.ring_bytes + kTailBytes < kOvershoot)
    return cudaErrorInvalidValue;
  const size_t bytes =
      kControlBytes + kTailBytes + size_t(a.warps) * (kScratchBytes + a.ring_bytes);
  const dim3 grid(a.ctas, a.groups);
  auto launch = [&](auto kernel) {
    return Launch(stream, kernel, grid, a.warps * 32, bytes, overlap, a);
  };
  switch (a.group * 2 + bf16) {
    case 16:
      return launch(TiledCslKernel<false, 1>);
    case 17:
      return launch(TiledCslKernel<true, 1>);
    case 32:
      return launch(TiledCslKernel<false, 2>);
    case 33:
      return launch(TiledCslKernel<true, 2>);
    case 64:
      return launch(TiledCslKernel<false, 4>);
    case 65:
      return launch(TiledCslKernel<true, 4>);
    case 128:
      return launch(TiledCslKernel<false, 8>);
    case 129:
      return launch(TiledCslKernel<true, 8>);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace flashllm::cuda
