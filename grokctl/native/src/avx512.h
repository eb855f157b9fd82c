// What the forms with 512-bit registers share.
#ifndef GROKCTL_AVX512_H_
#define GROKCTL_AVX512_H_

#include <immintrin.h>

#include "multiply.h"

namespace {

GROKCTL_INLINE void interleave_512(const __m512i rows[4], uint8_t* packed) {
  const __m512i low = _mm512_unpacklo_epi8(rows[0], rows[1]);
  const __m512i high = _mm512_unpackhi_epi8(rows[0], rows[1]);
  const __m512i low2 = _mm512_unpacklo_epi8(rows[2], rows[3]);
  const __m512i high2 = _mm512_unpackhi_epi8(rows[2], rows[3]);
  _mm512_store_si512(packed, _mm512_unpacklo_epi16(low, low2));
  _mm512_store_si512(packed + 64, _mm512_unpackhi_epi16(low, low2));
  _mm512_store_si512(packed + 128, _mm512_unpacklo_epi16(high, high2));
  _mm512_store_si512(packed + 192, _mm512_unpackhi_epi16(high, high2));
}

GROKCTL_INLINE __m512i four_bytes(const uint8_t* from) {
  int32_t bytes;
  memcpy(&bytes, from, sizeof bytes);
  return _mm512_set1_epi32(bytes);
}

struct Avx512 {
  using Register = __m512i;
  using Sum = int32_t;
  static constexpr int kMostRows = 256, kQuads = 1, kOffset = 128;

  GROKCTL_INLINE Register zero() { return _mm512_setzero_si512(); }
  GROKCTL_INLINE Register load(const int32_t* sums) { return _mm512_load_si512(sums); }
  GROKCTL_INLINE void store(int32_t* sums, Register values) { _mm512_store_si512(sums, values); }

  GROKCTL_INLINE void interleave_bytes(const uint8_t* const* rows, uint8_t* packed) {
    __m512i codes[4];
    for (int row = 0; row < 4; ++row)
      codes[row] = _mm512_xor_si512(_mm512_loadu_si512(rows[row]), _mm512_set1_epi8(-128));
    interleave_512(codes, packed);
  }

  GROKCTL_INLINE void interleave_nibbles(const uint8_t* const* rows, uint8_t* packed) {
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i codes[4];
    for (int row = 0; row < 2; ++row) {
      const __m512i both = _mm512_loadu_si512(rows[row]);
      codes[2 * row] = _mm512_and_si512(both, nibble);
      codes[2 * row + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    }
    interleave_512(codes, packed);
  }
};

struct FloatUnit {
  using Register = __m512;
  using Codes = __m512;
  using Sum = float;
  static constexpr int kRows = 6, kFactorBytes = 4;

  GROKCTL_INLINE Register zero() { return _mm512_setzero_ps(); }
  GROKCTL_INLINE Register load(const float* sums) { return _mm512_load_ps(sums); }
  GROKCTL_INLINE void store(float* sums, Register values) { _mm512_store_ps(sums, values); }
  GROKCTL_INLINE Codes codes(const uint8_t* packed) { return _mm512_load_ps(packed); }
  GROKCTL_INLINE __m512 factors(const uint8_t* activations) {
    float factor;
    memcpy(&factor, activations, sizeof factor);
    return _mm512_set1_ps(factor);
  }
  GROKCTL_INLINE Register add(Register sums, Codes codes, __m512 factors) {
    return _mm512_fmadd_ps(codes, factors, sums);
  }
};

}  // namespace

#endif  // GROKCTL_AVX512_H_
