// The form for NEON with matrix products of bytes: `smmla` multiplies two rows of eight inputs by two
// columns. With few rows, `sdot` does as well.
#include "forms.h"
#include "neon.h"
#include "processor.h"

namespace {

// Two rows of activations times four columns: the sums of the first two columns, and of the others.
struct Pair {
  int32x4_t left, right;

  GROKCTL_MEMBER void load(const int32_t* sums, bool is_first) {
    const int32x4_t above = is_first ? vdupq_n_s32(0) : vld1q_s32(sums);
    const int32x4_t below = is_first ? vdupq_n_s32(0) : vld1q_s32(sums + kBlock);
    left = vcombine_s32(vget_low_s32(above), vget_low_s32(below));
    right = vcombine_s32(vget_high_s32(above), vget_high_s32(below));
  }

  GROKCTL_MEMBER void store(int32_t* sums) const {
    vst1q_s32(sums, vcombine_s32(vget_low_s32(left), vget_low_s32(right)));
    vst1q_s32(sums + kBlock, vcombine_s32(vget_high_s32(left), vget_high_s32(right)));
  }

  GROKCTL_MEMBER void add(int8x16_t rows, int8x16_t first, int8x16_t last) {
    left = vmmlaq_s32(left, rows, first);
    right = vmmlaq_s32(right, rows, last);
  }
};

// Eight inputs of two columns side by side, from two lines of four inputs.
GROKCTL_INLINE int8x16_t first_columns(const uint8_t* packed) {
  const uint32x4_t line = vreinterpretq_u32_u8(vld1q_u8(packed));
  const uint32x4_t next = vreinterpretq_u32_u8(vld1q_u8(packed + 4 * kBlock));
  return vreinterpretq_s8_u32(vzip1q_u32(line, next));
}

GROKCTL_INLINE int8x16_t last_columns(const uint8_t* packed) {
  const uint32x4_t line = vreinterpretq_u32_u8(vld1q_u8(packed));
  const uint32x4_t next = vreinterpretq_u32_u8(vld1q_u8(packed + 4 * kBlock));
  return vreinterpretq_s8_u32(vzip2q_u32(line, next));
}

GROKCTL_INLINE int8x16_t two_rows(const uint8_t* activations, int64_t stride) {
  return vreinterpretq_s8_u8(vcombine_u8(vld1_u8(activations), vld1_u8(activations + stride)));
}

struct Unit : Neon {
  static constexpr int kQuads = 2;

  // Four rows times eight columns.
  static void dot_four(const uint8_t* packed, int64_t lines, const uint8_t* activations,
                       int64_t stride, int32_t* sums, bool is_first) {
    Pair a, b, c, d;
    int32_t* below = sums + 2 * kBlock;
    a.load(sums, is_first);
    b.load(sums + 4, is_first);
    c.load(below, is_first);
    d.load(below + 4, is_first);
    for (int64_t line = 0; line < lines; line += 2, packed += 8 * kBlock, activations += 8) {
      const int8x16_t above = two_rows(activations, stride);
      const int8x16_t under = two_rows(activations + 2 * stride, stride);
      const int8x16_t first = first_columns(packed), second = last_columns(packed);
      const int8x16_t third = first_columns(packed + 16), fourth = last_columns(packed + 16);
      a.add(above, first, second);
      b.add(above, third, fourth);
      c.add(under, first, second);
      d.add(under, third, fourth);
    }
    a.store(sums);
    b.store(sums + 4);
    c.store(below);
    d.store(below + 4);
  }

  static void dot(const uint8_t* packed, int64_t lines, const uint8_t* activations, int64_t stride,
                  int64_t rows, int32_t* sums, bool is_first) {
    if (rows < 16) {
      dot_tiles<Unit, kRows>(packed, lines, activations, stride, rows, sums, is_first);
      return;
    }
    for (int64_t row = 0; row < rows; row += 4) {
      for (int64_t column = 0; column < kBlock; column += 8)
        dot_four(packed + column * 4, lines, activations + row * stride, stride,
                 sums + row * kBlock + column, is_first);
    }
  }
};

bool runs_here() { return grokctl::processor().i8mm; }

void prepare(const grokctl::Product& product, int64_t first, int64_t last) {
  prepare_tokens<Unit::Number>(product, first, last);
}

void multiply(const grokctl::Product& product, const grokctl::Scratch& scratch,
              const grokctl::Part& part) {
  multiply_part<Unit, FloatUnit>(product, scratch, part);
}

void activate(float* gate, const float* up, int64_t count) { activate_all(gate, up, count); }

void multiply_back(const grokctl::Back& back, int64_t first, int64_t last) {
  multiply_back_rows(back, first, last);
}

}  // namespace

const grokctl::Form grokctl::neon_i8mm = {
    "neon_i8mm", runs_here, sizeof(Unit::Number), grokctl::kAnyRows,
    prepare, multiply, activate, multiply_back,
};
