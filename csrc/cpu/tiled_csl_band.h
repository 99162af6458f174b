// The Tiled-CSL band kernel, written once and compiled for each instruction set. Works on
// the nonzeros alone: a load, a few multiply-adds and a store of accumulators each.
#pragma once
#include "../tiled_csl.h"
#include "kernels.h"

namespace flashllm {

template <Half H, int kTokens>
static Status TiledCslTokens(const TiledCslBand& band, float* acc) {
  const int tokens = kTokens ? kTokens : band.tokens;
  for (int64_t tile = 0; tile < band.tiles; ++tile) {
    const int64_t begin = static_cast<int64_t>(band.offsets[tile]) * tiled_csl::kVector;
    const int64_t end = static_cast<int64_t>(band.offsets[tile + 1]) * tiled_csl::kVector;
    if (begin > end || end > band.capacity) return Status::kOutOfRange;
    const float* x = band.x + tile * tiled_csl::kTileCols * tokens;
    for (int64_t i = begin; i < end; ++i) {
      const int position = band.positions[i];
      const float v = HalfToFloat<H>(band.values[i]);
      float* a = acc + tiled_csl::PositionRow(position) * tokens;
      const float* b = x + tiled_csl::PositionCol(position) * tokens;
      for (int n = 0; n < tokens; ++n) a[n] += v * b[n];
    }
  }
  return Status::kOk;
}

template <Half H>
static Status TiledCslBandKernel(const TiledCslBand& band, float* sums) {
  const int n = band.tokens;
  float acc[tiled_csl::kTileRows * kMaxTokens];
  std::memset(acc, 0, sizeof(float) * tiled_csl::kTileRows * n);
  Status status;
  switch (n) {
    case 1:
      status = TiledCslTokens<H, 1>(band, acc);
      break;
    case 4:
      status = TiledCslTokens<H, 4>(band, acc);
      break;
    case 16:
      status = TiledCslTokens<H, 16>(band, acc);
      break;
    default:
      status = TiledCslTokens<H, 0>(band, acc);
  }
  for (int r = 0; r < tiled_csl::kTileRows; ++r)
    for (int t = 0; t < n; ++t) sums[t * tiled_csl::kTileRows + r] = acc[r * n + t];
  return status;
}

}  // namespace flashllm
