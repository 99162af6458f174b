// AVX-512 with VBMI2: vpexpandw turns a mask and a run of nonzeros into 32 dense weights.
//
// One 32-bit mask covers step i of lanes 4g..4g+3, so an expanded register holds, for
// t = 0..3, four weights of row g and four of row g + 8. fp32 path: its halves become two
// registers of 16 floats, multiplied with x written twice; lanes 0-3 and 8-11 of an
// accumulator then sum row g, lanes 4-7 and 12-15 row g + 8.
#include <immintrin.h>

#include "delta_csr_item.h"
#include "kernels.h"

namespace flashllm {
namespace {

using namespace bitmap;

// The lane-major mask words of a tile as expand masks, m[8 i + g].
inline void TileMasks(const uint32_t* masks, uint32_t (&m)[kLanes]) {
  // Byte (t, i) of quad g to byte (i, t): inside 128-bit lanes; then word (g, i) to (i, g).
  const __m512i bytes =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i a = _mm512_shuffle_epi8(_mm512_loadu_si512(masks), bytes);
  const __m512i b = _mm512_shuffle_epi8(_mm512_loadu_si512(masks + 16), bytes);
  const __m512i low = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(2));
  _mm512_storeu_si512(m, _mm512_permutex2var_epi32(a, low, b));
  _mm512_storeu_si512(m + 16, _mm512_permutex2var_epi32(a, high, b));
}

constexpr int kPrefetchTiles = 3;  // tuned on Zen 4: 1 is too late

// Loads first, expands in the register: the memory form of vpexpandw is several times slower,
// and callers guarantee 32 readable elements. The empty asm keeps the compiler from fusing them.
inline __m512i Expand(uint32_t mask, const uint16_t* p) {
  __m512i run = _mm512_loadu_si512(p);
  asm("" : "+v"(run));
  return _mm512_maskz_expand_epi16(mask, run);
}

template <Half H>
inline __m512 ToFloat(__m256i h) {
  if constexpr (H == Half::kF16) return _mm512_cvtph_ps(h);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

template <Half H>
inline void ToFloats(__m512i v, __m512& low, __m512& high) {
  low = ToFloat<H>(_mm512_castsi512_si256(v));
  high = ToFloat<H>(_mm512_extracti64x4_epi64(v, 1));
}

// Sums of rows g and g + 8.
inline void StoreRows(__m512 acc, float* sums, int g) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(acc), _mm512_extractf32x8_ps(acc, 1));
  __m128 top = _mm256_castps256_ps128(half), bottom = _mm256_extractf128_ps(half, 1);
  const __m128 pair = _mm_hadd_ps(top, bottom);
  const __m128 one = _mm_hadd_ps(pair, pair);
  sums[g] = _mm_cvtss_f32(one);
  sums[g + 8] = _mm_cvtss_f32(_mm_movehdup_ps(one));
}

// Starts of the four step runs of a tile; returns the tile's end. Four runs side by side hide
// the stream from the hardware's prefetcher, so the tiles after the next are asked for here.
inline const uint16_t* StepRuns(const uint16_t* p, const uint32_t (&m)[kLanes],
                                const uint16_t* (&run)[kSteps]) {
  const uint16_t* const begin = p;
  for (int i = 0; i < kSteps; ++i) {
    run[i] = p;
    for (int g = 0; g < 8; ++g) p += __builtin_popcount(m[8 * i + g]);
  }
  for (const uint16_t* q = begin; q < p; q += 32)
    _mm_prefetch(reinterpret_cast<const char*>(q + kPrefetchTiles * (p - begin)), _MM_HINT_T0);
  return p;
}

// Several tokens: four rows of a tile (256 weights) stay in sixteen registers while every token
// passes, so that each load of x feeds two multiply-adds.
template <Half H>
Status ManyTokens(const BitmapBand& band, float* sums) {
  const int n = band.tokens;
  const float* x = static_cast<const float*>(band.x);
  uint16_t scratch[kBlockWeights + 32];
  const uint16_t* p = nullptr;
  alignas(64) float acc[8 * kMaxTokens * 16];
  std::memset(acc, 0, sizeof(float) * 8 * 16 * n);
  for (int64_t tile = 0; tile < band.tiles; ++tile, x += kSteps * n * 32) {
    if (tile % kBlockTiles == 0 && !(p = BlockValues(band, tile / kBlockTiles, scratch)))
      return Status::kOutOfRange;
    uint32_t m[kLanes];
    const uint16_t* run[kSteps];
    TileMasks(band.masks + tile * kLanes, m);
    p = StepRuns(p, m, run);
    for (int g = 0; g < 8; g += 2) {
      __m512 w[2][2 * kSteps];
#pragma GCC unroll 8
      for (int i = 0; i < kSteps; ++i)
        for (int r = 0; r < 2; ++r) {
          const uint32_t mask = m[8 * i + g + r];
          ToFloats<H>(Expand(mask, run[i]), w[r][2 * i], w[r][2 * i + 1]);
          run[i] += __builtin_popcount(mask);
        }
      float* a = acc + g * n * 16;
      float* b = a + n * 16;
      const float* xt = x;
      for (int t = 0; t < n; ++t, a += 16, b += 16, xt += 32) {
        __m512 sa = _mm512_load_ps(a), sb = _mm512_load_ps(b);
#pragma GCC unroll 8
        for (int i = 0; i < kSteps; ++i) {
          const __m512 x0 = _mm512_loadu_ps(xt + i * n * 32);
          const __m512 x1 = _mm512_loadu_ps(xt + i * n * 32 + 16);
          sa = _mm512_fmadd_ps(w[0][2 * i], x0, sa);
          sb = _mm512_fmadd_ps(w[1][2 * i], x0, sb);
          sa = _mm512_fmadd_ps(w[0][2 * i + 1], x1, sa);
          sb = _mm512_fmadd_ps(w[1][2 * i + 1], x1, sb);
        }
        _mm512_store_ps(a, sa);
        _mm512_store_ps(b, sb);
      }
    }
  }
  for (int g = 0; g < 8; ++g)
    for (int t = 0; t < n; ++t)
      StoreRows(_mm512_load_ps(acc + (g * n + t) * 16), sums + t * kBandRows, g);
  return Status::kOk;
}

// One token does too little with a weight to pay for vpexpandw, 4.7 cycles on Zen 4 where four
// byte shuffles take 1.8: the AVX2 kernel is the faster one (docs/kernels.md).
Status OneOrManyF16(const BitmapBand& band, float* sums) {
  return band.tokens == 1 ? kAvx2Kernels.bitmap_f16(band, sums)
                          : ManyTokens<Half::kF16>(band, sums);
}
Status OneOrManyBf16(const BitmapBand& band, float* sums) {
  return band.tokens == 1 ? kAvx2Kernels.bitmap_bf16(band, sums)
                          : ManyTokens<Half::kBF16>(band, sums);
}

// bf16 pairs multiplied as they come out of the expand. The instruction reads subnormals as
// zero: a band that holds one is reported and done again in fp32. Looked for among the values
// as stored, which are fewer than the weights.
inline bool HoldsSubnormal(const uint16_t* begin, const uint16_t* end) {
  __mmask32 any = 0;
  for (; begin < end; begin += 32) {
    const __mmask32 inside = end - begin < 32 ? (1u << (end - begin)) - 1 : ~0u;
    const __m512i v = _mm512_maskz_loadu_epi16(inside, begin);
    const __mmask32 zero_exponent = _mm512_testn_epi16_mask(v, _mm512_set1_epi16(0x7f80));
    any |= _mm512_mask_test_epi16_mask(zero_exponent, v, _mm512_set1_epi16(0x007f));
  }
  return any != 0;
}

Status DotOneToken(const BitmapBand& band, float* sums) {
  const uint16_t* x = static_cast<const uint16_t*>(band.x);
  uint16_t scratch[kBlockWeights + 32];
  const uint16_t *p = nullptr, *block = nullptr;
  __m512 acc[8];
  for (auto& a : acc) a = _mm512_setzero_ps();
  for (int64_t tile = 0; tile < band.tiles; ++tile) {
    if (tile % kBlockTiles == 0) {
      if (HoldsSubnormal(block, p)) return Status::kSubnormal;
      if (!(p = block = BlockValues(band, tile / kBlockTiles, scratch))) return Status::kOutOfRange;
    }
    uint32_t m[kLanes];
    TileMasks(band.masks + tile * kLanes, m);
    for (int i = 0; i < kSteps; ++i, x += 32) {
      const __m512i x0 = _mm512_loadu_si512(x);
#pragma GCC unroll 8
      for (int g = 0; g < 8; ++g) {
        const uint32_t mask = m[8 * i + g];
        const __m512i v = Expand(mask, p);
        p += __builtin_popcount(mask);
        acc[g] = _mm512_dpbf16_ps(acc[g], (__m512bh)v, (__m512bh)x0);
      }
    }
  }
  if (HoldsSubnormal(block, p)) return Status::kSubnormal;
  // An accumulator lane holds a pair of columns: lanes 0, 1 row g, lanes 2, 3 row g + 8, ...
  const __m512i rows = _mm512_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  for (int g = 0; g < 8; ++g) StoreRows(_mm512_permutexvar_ps(rows, acc[g]), sums, g);
  return Status::kOk;
}

Status DotManyTokens(const BitmapBand& band, float* sums) {
  const int n = band.tokens;
  const uint16_t* x = static_cast<const uint16_t*>(band.x);
  uint16_t scratch[kBlockWeights + 32];
  const uint16_t *p = nullptr, *block = nullptr;
  alignas(64) float acc[8 * kMaxTokens * 16];
  std::memset(acc, 0, sizeof(float) * 8 * 16 * n);
  for (int64_t tile = 0; tile < band.tiles; ++tile, x += kSteps * n * 32) {
    if (tile % kBlockTiles == 0) {
      if (HoldsSubnormal(block, p)) return Status::kSubnormal;
      if (!(p = block = BlockValues(band, tile / kBlockTiles, scratch))) return Status::kOutOfRange;
    }
    uint32_t m[kLanes];
    const uint16_t* run[kSteps];
    TileMasks(band.masks + tile * kLanes, m);
    p = StepRuns(p, m, run);
    for (int g = 0; g < 8; g += 4) {  // eight rows: each x is loaded for four multiplications
      __m512i w[4][kSteps];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < kSteps; ++i) {
          const uint32_t mask = m[8 * i + g + r];
          w[r][i] = Expand(mask, run[i]);
          run[i] += __builtin_popcount(mask);
        }
      float* a = acc + g * n * 16;
      const uint16_t* xt = x;
      for (int t = 0; t < n; ++t, a += 16, xt += 32) {
        __m512 s[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) s[r] = _mm512_load_ps(a + r * n * 16);
#pragma GCC unroll 4
        for (int i = 0; i < kSteps; ++i) {
          __m512i xi = _mm512_loadu_si512(xt + i * n * 32);
          asm("" : "+v"(xi));  // one load for four uses, not four memory operands
#pragma GCC unroll 4
          for (int r = 0; r < 4; ++r)
            s[r] = _mm512_dpbf16_ps(s[r], (__m512bh)w[r][i], (__m512bh)xi);
        }
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) _mm512_store_ps(a + r * n * 16, s[r]);
      }
    }
  }
  if (HoldsSubnormal(block, p)) return Status::kSubnormal;
  const __m512i rows = _mm512_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  for (int g = 0; g < 8; ++g)
    for (int t = 0; t < n; ++t)
      StoreRows(_mm512_permutexvar_ps(rows, _mm512_load_ps(acc + (g * n + t) * 16)),
                sums + t * kBandRows, g);
  return Status::kOk;
}

Status BitmapBf16Dot(const BitmapBand& band, float* sums) {
  return band.tokens == 1 ? DotOneToken(band, sums) : DotManyTokens(band, sums);
}

// 64 weights of a row, as `bits` has them; moves p behind their values.
inline void ExpandRow(uint64_t bits, const uint16_t*& p, __m512i (&out)[2]) {
  for (int i = 0; i < 2; ++i) {
    const uint32_t mask = static_cast<uint32_t>(bits >> (32 * i));
    const int count = __builtin_popcount(mask);
    // Nothing behind the row's values is touched: they may be the last ones.
    out[i] = _mm512_maskz_expand_epi16(mask, _mm512_maskz_loadu_epi16(_bzhi_u32(~0u, count), p));
    p += count;
  }
}

// Four neighbouring weights of a row are 64 bits, and step i takes number 4 t + i of the sixteen.
uint16_t* Reorder(const uint64_t (&bits)[kBandRows], const uint16_t* (&rows)[kBandRows],
                  const uint32_t* masks, uint16_t* out) {
  uint32_t m[kLanes];
  TileMasks(masks, m);
  __m512i steps[kSteps][8];
  const __m512i first = _mm512_setr_epi64(0, 8, 4, 12, 1, 9, 5, 13);  // steps 0 and 1, t = 0 and 1
  const __m512i second = _mm512_add_epi64(first, _mm512_set1_epi64(2));
  const __m512i low = _mm512_setr_epi64(0, 1, 2, 3, 8, 9, 10, 11);
  const __m512i high = _mm512_add_epi64(low, _mm512_set1_epi64(4));
  for (int g = 0; g < 8; ++g) {
    __m512i top[2], bottom[2];
    ExpandRow(bits[g], rows[g], top);
    ExpandRow(bits[g + 8], rows[g + 8], bottom);
    const __m512i a = _mm512_permutex2var_epi64(top[0], first, bottom[0]);
    const __m512i b = _mm512_permutex2var_epi64(top[1], first, bottom[1]);
    const __m512i c = _mm512_permutex2var_epi64(top[0], second, bottom[0]);
    const __m512i d = _mm512_permutex2var_epi64(top[1], second, bottom[1]);
    steps[0][g] = _mm512_permutex2var_epi64(a, low, b);
    steps[1][g] = _mm512_permutex2var_epi64(a, high, b);
    steps[2][g] = _mm512_permutex2var_epi64(c, low, d);
    steps[3][g] = _mm512_permutex2var_epi64(c, high, d);
  }
  for (int i = 0; i < kLanes; ++i) {
    // In the register: the memory form of vpcompressw is many times slower.
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(m[i], steps[i / 8][i % 8]));
    out += __builtin_popcount(m[i]);
  }
  return out;
}

template <Half H>
struct Widen {
  static constexpr int kFloats = 16;
  static void Call(const uint16_t* p, float* out) {
    const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    _mm_storeu_ps(out, H == Half::kF16
                           ? _mm_cvtph_ps(v)
                           : _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(v), 16)));
  }
};

}  // namespace

const Kernels kAvx512Kernels = {
    "avx512",
    OneOrManyF16,
    OneOrManyBf16,
    BitmapBf16Dot,
    Reorder,
    ItemProduct<Widen<Half::kF16>>,
    ItemProduct<Widen<Half::kBF16>>,
};

}  // namespace flashllm
