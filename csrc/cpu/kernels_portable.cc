// Any CPU: the layout walked bit by bit, multiplying only what is stored.
//
// A weight that is not stored is a zero, and 0 * Inf is NaN: a token with a non-finite
// feature is finished by the caller's dense rule (spmm.cc), not here.
#include "delta_csr_item.h"
#include "kernels.h"

namespace flashllm {
namespace {

template <Half H>
Status BitmapPortable(const BitmapBand& band, float* sums) {
  using namespace bitmap;
  const int n = band.tokens;
  const float* x = static_cast<const float*>(band.x);
  std::memset(sums, 0, sizeof(float) * kBandRows * n);
  uint16_t scratch[kBlockWeights + 32];
  const uint16_t* p = nullptr;
  for (int64_t tile = 0; tile < band.tiles; ++tile) {
    if (tile % kBlockTiles == 0 && !(p = BlockValues(band, tile / kBlockTiles, scratch)))
      return Status::kOutOfRange;
    const uint32_t* masks = band.masks + tile * kLanes;
    for (int i = 0; i < kSteps; ++i, x += n * 32)
      for (int lane = 0; lane < kLanes; ++lane) {
        for (uint32_t byte = masks[lane] >> (8 * i) & 0xff; byte; byte &= byte - 1) {
          const int bit = __builtin_ctz(byte);
          const float v = HalfToFloat<H>(*p++);
          const float* xs = x + (lane & 3) * 8 + bit;
          float* out = sums + TileRow(lane, bit);
          for (int t = 0; t < n; ++t) out[t * kBandRows] += v * xs[t * 32];
        }
      }
  }
  return Status::kOk;
}

template <Half H>
struct Widen {
  static constexpr int kFloats = 4;
  static void Call(const uint16_t* p, float* out) {
    for (int i = 0; i < delta_csr::kSteps; ++i) out[i] = HalfToFloat<H>(p[i]);
  }
};

}  // namespace

const Kernels kPortableKernels = {
    "portable", BitmapPortable<Half::kF16>,     BitmapPortable<Half::kBF16>,     nullptr,
    nullptr,    ItemProduct<Widen<Half::kF16>>, ItemProduct<Widen<Half::kBF16>>,
};

}  // namespace flashllm
