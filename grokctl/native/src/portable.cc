// The form for any processor.
#include "forms.h"
#include "multiply.h"

namespace {

struct Unit {
  using Number = int8_t;
  static constexpr int kMostRows = 256, kQuads = 1, kOffset = 128;

  // Where a column stands among the interleaved ones.
  static int place(int column) { return column % 16 / 4 * 16 + column / 16 * 4 + column % 4; }

  static void interleave_bytes(const uint8_t* const* rows, uint8_t* packed) {
    for (int column = 0; column < kBlock; ++column) {
      for (int row = 0; row < 4; ++row) packed[place(column) * 4 + row] = rows[row][column] ^ 128;
    }
  }

  static void interleave_nibbles(const uint8_t* const* rows, uint8_t* packed) {
    for (int column = 0; column < kBlock; ++column) {
      uint8_t* own = packed + place(column) * 4;
      for (int row = 0; row < 2; ++row) {
        own[2 * row] = rows[row][column] & 15;
        own[2 * row + 1] = rows[row][column] >> 4;
      }
    }
  }

  static void dot(const uint8_t* packed, int64_t lines, const uint8_t* activations, int64_t stride,
                  int64_t rows, int32_t* sums, bool is_first) {
    for (int64_t row = 0; row < rows; ++row, activations += stride, sums += kBlock) {
      int32_t totals[kBlock] = {};
      for (int64_t line = 0; line < lines; ++line) {
        const uint8_t* codes = packed + line * 4 * kBlock;
        int32_t factors[4];
        for (int input = 0; input < 4; ++input)
          factors[input] = static_cast<int8_t>(activations[line * 4 + input]);
        for (int column = 0; column < kBlock; ++column) {
          const uint8_t* own = codes + column * 4;
          totals[column] += own[0] * factors[0] + own[1] * factors[1] + own[2] * factors[2] +
                            own[3] * factors[3];
        }
      }
      for (int column = 0; column < kBlock; ++column)
        sums[column] = is_first ? totals[column] : sums[column] + totals[column];
    }
  }
};

struct FloatUnit {
  using Register = Floats;
  using Codes = Floats;
  using Sum = float;
  static constexpr int kRows = 1, kFactorBytes = 4;

  GROKCTL_INLINE Register zero() { return Floats{}; }
  GROKCTL_INLINE Register load(const float* sums) { return ::load<Floats>(sums); }
  GROKCTL_INLINE void store(float* sums, Register values) { ::store(sums, values); }
  GROKCTL_INLINE Codes codes(const uint8_t* packed) { return ::load<Floats>(packed); }
  GROKCTL_INLINE Floats factors(const uint8_t* activations) {
    float factor;
    memcpy(&factor, activations, sizeof factor);
    return Floats{} + factor;
  }
  GROKCTL_INLINE Register add(Register sums, Codes codes, Floats factors) {
    return codes * factors + sums;
  }
};

bool runs_here() { return true; }

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

const grokctl::Form grokctl::portable = {
    "portable", runs_here, sizeof(Unit::Number), grokctl::kAnyRows,
    prepare, multiply, activate, multiply_back,
};
