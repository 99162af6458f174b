// Tiled-CSL main loop: expand a 64 x 128 block into shared memory, read it back as fragments.
//
// Four warps, 16 rows each. A block's halves lie in fragment order, so one 16-byte load a lane
// is the A operand of a step. 64 threads walk the lists, then all take the tail.
#include "../tiled_csl.h"
#include "strips.cuh"
#include "tiled_csl_block.cuh"

namespace flashllm::cuda {
namespace {

using tiled_csl::kBlockCols;
using tiled_csl::kLists;

constexpr int kThreads = 128;
constexpr int kScratch = (tiled_csl::kRows + 1) * kLists;
static_assert(tiled_csl::kBlockRows == kThreads / 32 * 16, "a warp takes 16 rows");

template <bool kBf16, int kN8>
__global__ void __launch_bounds__(kThreads) TiledCslKernel(const __grid_constant__ Args a) {
  __shared__ __align__(128) uint16_t scratch[kScratch];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = blockIdx.y;
  const int64_t unit0 = FirstUnit(a, blockIdx.x);
  const int count = static_cast<int>(FirstUnit(a, blockIdx.x + 1) - unit0);
  ptx::LaunchDependents();
  ptx::WaitForPrevious();
  if (count == 0) return;

  int strip = static_cast<int>(unit0 / a.blocks), block = static_cast<int>(unit0 % a.blocks);
  int segment = block, ordinal = 0;
  float acc[kN8][4] = {};
  const int token = group * kN8 * 8 + (lane >> 2);
  const uint16_t* x_lane = a.x + token * a.x_stride + (lane & 3) * 16;

  for (int i = 0; i < count; ++i) {
    for (int v = threadIdx.x; v < kScratch / 8; v += kThreads)
      reinterpret_cast<uint4*>(scratch)[v] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    const int shard_strips = a.shard_bands / 4, shard = strip / shard_strips;
    const CslBlock b =
        LocateBlock(a.index, a.offsets, a.index_capacity, a.capacity, shard, a.shard_offsets,
                    int64_t(strip % shard_strips) * a.blocks + block);
    const uint16_t* values = a.values + b.value;
    ForEachWeight<kThreads>(b, [&](int position, int64_t at) { scratch[position] = values[at]; });
    __syncthreads();

#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int64_t col = int64_t(block) * kBlockCols + tile * 64;
      if (col >= a.x_stride) break;  // x has whole tiles of 64 columns, blocks have two
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const uint4 w = *reinterpret_cast<const uint4*>(
            scratch + kLists + ((warp * 2 + tile) * 4 + step) * 256 + lane * 8);
        const uint32_t fragment[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int n8 = 0; n8 < kN8; ++n8) {
          uint32_t b0 = 0, b1 = 0;
          if (token + n8 * 8 < a.tokens) {
            const uint16_t* p = x_lane + n8 * 8 * a.x_stride + col + step * 4;
            b0 = ptx::LoadCached4(p);
            b1 = ptx::LoadCached4(p + 2);
          }
          ptx::Mma<kBf16>(acc[n8], fragment, b0, b1);
        }
      }
    }
    __syncthreads();  // all have read the block

    const bool strip_ends = block + 1 == a.blocks;
    if (strip_ends || i + 1 == count) {
      Flush<kN8>(a, group, strip, ordinal, segment == 0 && strip_ends, warp, lane, acc);
      ++ordinal;
      segment = 0;
    }
    if (++block == a.blocks) {
      block = 0;
      ++strip;
    }
  }
}

}  // namespace

cudaError_t TiledCslSpmm(cudaStream_t stream, const Args& a, bool bf16) {
  if (a.warps * 32 != kThreads) return cudaErrorInvalidValue;
  const dim3 grid(a.ctas, a.groups);
  auto launch = [&](auto kernel) {
    kernel<<<grid, kThreads, 0, stream>>>(a);
    return cudaGetLastError();
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
