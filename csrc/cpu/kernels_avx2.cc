// AVX2, FMA and F16C: a table of byte shuffles stands in for vpexpandw, eight weights (one
// lane's byte: four of row g, four of row g + 8) at a time.
#include <immintrin.h>

#include "delta_csr_item.h"
#include "kernels.h"

namespace flashllm {
namespace {

using namespace bitmap;

struct ShuffleTable {
  alignas(16) uint8_t entry[256][16];
  constexpr ShuffleTable() : entry() {
    for (int byte = 0; byte < 256; ++byte) {
      int next = 0;
      for (int bit = 0; bit < 8; ++bit) {
        const bool set = byte >> bit & 1;
        entry[byte][2 * bit] = set ? 2 * next : 0x80;  // 0x80 writes a zero byte
        entry[byte][2 * bit + 1] = set ? 2 * next + 1 : 0x80;
        next += set;
      }
    }
  }
};
constexpr ShuffleTable kShuffle;

template <Half H>
inline __m256 Expand(uint32_t byte, const uint16_t* p) {
  const __m128i run = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i shuffle = _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffle.entry[byte]));
  const __m128i v = _mm_shuffle_epi8(run, shuffle);
  if constexpr (H == Half::kF16) return _mm256_cvtph_ps(v);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}

// One token: eight accumulators, each four partial sums of row g and four of row g + 8, stay
// in registers; eight weights cost about nine instructions.
template <Half H>
Status OneToken(const BitmapBand& band, float* sums) {
  const float* x = static_cast<const float*>(band.x);
  uint16_t scratch[kBlockWeights + 32];
  const uint16_t* p = nullptr;
  __m256 acc[8];
  for (auto& a : acc) a = _mm256_setzero_ps();
  for (int64_t tile = 0; tile < band.tiles; ++tile) {
    if (tile % kBlockTiles == 0 && !(p = BlockValues(band, tile / kBlockTiles, scratch)))
      return Status::kOutOfRange;
    const auto* bytes = reinterpret_cast<const uint8_t*>(band.masks + tile * kLanes);
    for (int i = 0; i < kSteps; ++i, ++bytes, x += 32) {
      const __m256 xs[4] = {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8), _mm256_loadu_ps(x + 16),
                            _mm256_loadu_ps(x + 24)};
#pragma GCC unroll 8
      for (int g = 0; g < 8; ++g) {
#pragma GCC unroll 4
        for (int t = 0; t < 4; ++t) {
          const uint32_t byte = bytes[4 * (4 * g + t)];
          acc[g] = _mm256_fmadd_ps(Expand<H>(byte, p), xs[t], acc[g]);
          p += __builtin_popcount(byte);
        }
      }
    }
  }
  for (int g = 0; g < 8; ++g) {
    alignas(32) float a[8];
    _mm256_store_ps(a, acc[g]);
    sums[g] = (a[0] + a[1]) + (a[2] + a[3]);
    sums[g + 8] = (a[4] + a[5]) + (a[6] + a[7]);
  }
  return Status::kOk;
}

template <Half H>
Status ManyTokens(const BitmapBand& band, float* sums) {
  const int n = band.tokens;
  const float* x = static_cast<const float*>(band.x);
  uint16_t scratch[kBlockWeights + 32];
  const uint16_t* p = nullptr;
  alignas(32) float acc[8 * kMaxTokens * 8];
  std::memset(acc, 0, sizeof(float) * 8 * 8 * n);
  for (int64_t tile = 0; tile < band.tiles; ++tile) {
    if (tile % kBlockTiles == 0 && !(p = BlockValues(band, tile / kBlockTiles, scratch)))
      return Status::kOutOfRange;
    const uint32_t* masks = band.masks + tile * kLanes;
    for (int i = 0; i < kSteps; ++i, x += n * 32)
      for (int g = 0; g < 8; ++g) {
        __m256 w[4];
        for (int t = 0; t < 4; ++t) {
          const uint32_t byte = masks[4 * g + t] >> (8 * i) & 0xff;
          w[t] = Expand<H>(byte, p);
          p += __builtin_popcount(byte);
        }
        float* a = acc + g * n * 8;
        const float* xt = x;
        for (int t = 0; t < n; ++t, a += 8, xt += 32) {
          __m256 sum = _mm256_fmadd_ps(w[0], _mm256_loadu_ps(xt), _mm256_load_ps(a));
          __m256 other = _mm256_mul_ps(w[1], _mm256_loadu_ps(xt + 8));
          sum = _mm256_fmadd_ps(w[2], _mm256_loadu_ps(xt + 16), sum);
          other = _mm256_fmadd_ps(w[3], _mm256_loadu_ps(xt + 24), other);
          _mm256_store_ps(a, _mm256_add_ps(sum, other));
        }
      }
  }
  for (int g = 0; g < 8; ++g)
    for (int t = 0; t < n; ++t) {
      const float* a = acc + (g * n + t) * 8;
      sums[t * kBandRows + g] = (a[0] + a[1]) + (a[2] + a[3]);
      sums[t * kBandRows + g + 8] = (a[4] + a[5]) + (a[6] + a[7]);
    }
  return Status::kOk;
}

template <Half H>
Status BitmapAvx2(const BitmapBand& band, float* sums) {
  return band.tokens == 1 ? OneToken<H>(band, sums) : ManyTokens<H>(band, sums);
}

template <Half H>
struct Widen {
  static constexpr int kFloats = 8;
  static void Call(const uint16_t* p, float* out) {
    const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    _mm_storeu_ps(out, H == Half::kF16
                           ? _mm_cvtph_ps(v)
                           : _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(v), 16)));
  }
};

}  // namespace

const Kernels kAvx2Kernels = {
    "avx2",  BitmapAvx2<Half::kF16>,         BitmapAvx2<Half::kBF16>,         nullptr,
    nullptr, ItemProduct<Widen<Half::kF16>>, ItemProduct<Widen<Half::kBF16>>,
};

}  // namespace flashllm
