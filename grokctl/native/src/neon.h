// What the forms for NEON share. Codes keep their sign: `sdot` multiplies signed bytes.
#ifndef GROKCTL_NEON_H_
#define GROKCTL_NEON_H_

#include <arm_neon.h>

#include "multiply.h"

namespace {

// Sixteen columns of four inputs.
GROKCTL_INLINE void interleave_128(const uint8x16_t rows[4], uint8_t* packed) {
  const uint16x8_t low = vreinterpretq_u16_u8(vzip1q_u8(rows[0], rows[1]));
  const uint16x8_t high = vreinterpretq_u16_u8(vzip2q_u8(rows[0], rows[1]));
  const uint16x8_t low2 = vreinterpretq_u16_u8(vzip1q_u8(rows[2], rows[3]));
  const uint16x8_t high2 = vreinterpretq_u16_u8(vzip2q_u8(rows[2], rows[3]));
  vst1q_u8(packed, vreinterpretq_u8_u16(vzip1q_u16(low, low2)));
  vst1q_u8(packed + 64, vreinterpretq_u8_u16(vzip2q_u16(low, low2)));
  vst1q_u8(packed + 128, vreinterpretq_u8_u16(vzip1q_u16(high, high2)));
  vst1q_u8(packed + 192, vreinterpretq_u8_u16(vzip2q_u16(high, high2)));
}

struct Neon {
  using Number = int8_t;
  using Register = int32x4_t;
  using Codes = int8x16_t;
  using Sum = int32_t;
  static constexpr int kRows = 6, kFactorBytes = 4, kMostRows = 256, kOffset = 0;

  GROKCTL_INLINE Register zero() { return vdupq_n_s32(0); }
  GROKCTL_INLINE Register load(const int32_t* sums) { return vld1q_s32(sums); }
  GROKCTL_INLINE void store(int32_t* sums, Register values) { vst1q_s32(sums, values); }
  GROKCTL_INLINE Codes codes(const uint8_t* packed) {
    return vreinterpretq_s8_u8(vld1q_u8(packed));
  }
  GROKCTL_INLINE Codes factors(const uint8_t* activations) {
    int32_t bytes;
    memcpy(&bytes, activations, sizeof bytes);
    return vreinterpretq_s8_s32(vdupq_n_s32(bytes));
  }
  GROKCTL_INLINE Register add(Register sums, Codes codes, Codes factors) {
    return vdotq_s32(sums, codes, factors);
  }

  GROKCTL_INLINE void interleave_bytes(const uint8_t* const* rows, uint8_t* packed) {
    for (int quarter = 0; quarter < 4; ++quarter) {
      uint8x16_t codes[4];
      for (int row = 0; row < 4; ++row) codes[row] = vld1q_u8(rows[row] + quarter * 16);
      interleave_128(codes, packed + quarter * 16);
    }
  }

  GROKCTL_INLINE void interleave_nibbles(const uint8_t* const* rows, uint8_t* packed) {
    for (int quarter = 0; quarter < 4; ++quarter) {
      uint8x16_t codes[4];
      for (int row = 0; row < 2; ++row) {
        const uint8x16_t both = vld1q_u8(rows[row] + quarter * 16);
        codes[2 * row] = vandq_u8(both, vdupq_n_u8(15));
        codes[2 * row + 1] = vshrq_n_u8(both, 4);
      }
      interleave_128(codes, packed + quarter * 16);
    }
  }
};

struct FloatUnit {
  using Register = float32x4_t;
  using Codes = float32x4_t;
  using Sum = float;
  static constexpr int kRows = 6, kFactorBytes = 4;

  GROKCTL_INLINE Register zero() { return vdupq_n_f32(0); }
  GROKCTL_INLINE Register load(const float* sums) { return vld1q_f32(sums); }
  GROKCTL_INLINE void store(float* sums, Register values) { vst1q_f32(sums, values); }
  GROKCTL_INLINE Codes codes(const uint8_t* packed) {
    return vreinterpretq_f32_u8(vld1q_u8(packed));
  }
  GROKCTL_INLINE Codes factors(const uint8_t* activations) {
    float factor;
    memcpy(&factor, activations, sizeof factor);
    return vdupq_n_f32(factor);
  }
  GROKCTL_INLINE Register add(Register sums, Codes codes, Codes factors) {
    return vfmaq_f32(sums, codes, factors);
  }
};

}  // namespace

#endif  // GROKCTL_NEON_H_
