// What the forms with 256-bit registers share.
#ifndef GROKCTL_AVX2_H_
#define GROKCTL_AVX2_H_

#include <immintrin.h>

#include "multiply.h"

namespace {

GROKCTL_INLINE __m256i load_256(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

GROKCTL_INLINE void interleave_256(const __m256i rows[4], uint8_t* packed) {
  const __m256i low = _mm256_unpacklo_epi8(rows[0], rows[1]);
  const __m256i high = _mm256_unpackhi_epi8(rows[0], rows[1]);
  const __m256i low2 = _mm256_unpacklo_epi8(rows[2], rows[3]);
  const __m256i high2 = _mm256_unpackhi_epi8(rows[2], rows[3]);
  __m256i* to = reinterpret_cast<__m256i*>(packed);
  _mm256_store_si256(to, _mm256_unpacklo_epi16(low, low2));
  _mm256_store_si256(to + 2, _mm256_unpackhi_epi16(low, low2));
  _mm256_store_si256(to + 4, _mm256_unpacklo_epi16(high, high2));
  _mm256_store_si256(to + 6, _mm256_unpackhi_epi16(high, high2));
}

GROKCTL_INLINE __m256i four_bytes(const uint8_t* from) {
  int32_t bytes;
  memcpy(&bytes, from, sizeof bytes);
  return _mm256_set1_epi32(bytes);
}

struct Avx2 {
  using Register = __m256i;
  using Sum = int32_t;
  static constexpr int kMostRows = 256, kQuads = 1, kOffset = 128;

  GROKCTL_INLINE Register zero() { return _mm256_setzero_si256(); }
  GROKCTL_INLINE Register load(const int32_t* sums) { return load_256(sums); }
  GROKCTL_INLINE void store(int32_t* sums, Register values) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(sums), values);
  }

  GROKCTL_INLINE void interleave_bytes(const uint8_t* const* rows, uint8_t* packed) {
    for (int half = 0; half < 2; ++half) {
      __m256i codes[4];
      for (int row = 0; row < 4; ++row)
        codes[row] = _mm256_xor_si256(load_256(rows[row] + half * 32), _mm256_set1_epi8(-128));
      interleave_256(codes, packed + half * 32);
    }
  }

  GROKCTL_INLINE void interleave_nibbles(const uint8_t* const* rows, uint8_t* packed) {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int half = 0; half < 2; ++half) {
      __m256i codes[4];
      for (int row = 0; row < 2; ++row) {
        const __m256i both = load_256(rows[row] + half * 32);
        codes[2 * row] = _mm256_and_si256(both, nibble);
        codes[2 * row + 1] = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
      }
      interleave_256(codes, packed + half * 32);
    }
  }
};

struct FloatUnit {
  using Register = __m256;
  using Codes = __m256;
  using Sum = float;
  static constexpr int kRows = 3, kFactorBytes = 4;

  GROKCTL_INLINE Register zero() { return _mm256_setzero_ps(); }
  GROKCTL_INLINE Register load(const float* sums) { return _mm256_load_ps(sums); }
  GROKCTL_INLINE void store(float* sums, Register values) { _mm256_store_ps(sums, values); }
  GROKCTL_INLINE Codes codes(const uint8_t* packed) {
    return _mm256_load_ps(reinterpret_cast<const float*>(packed));
  }
  GROKCTL_INLINE __m256 factors(const uint8_t* activations) {
    float factor;
    memcpy(&factor, activations, sizeof factor);
    return _mm256_set1_ps(factor);
  }
  GROKCTL_INLINE Register add(Register sums, Codes codes, __m256 factors) {
    return _mm256_fmadd_ps(codes, factors, sums);
  }
};

}  // namespace

#endif  // GROKCTL_AVX2_H_
