// The form for any processor.
#include "forms.h"
#include "multiply.h"

namespace {

struct Unit {
  using Number = int8_t;
  static constexpr int kRows = 2, kFloatRows = 1, kQuads = 1, kOffset = 128;

  // Where a column stands among the interleaved ones.
  static int place(int column) { return column % 16 / 4 * 16 + column / 16 * 4 + column % 4; }

  static void interleave_bytes(const uint8_t* const rows[4], uint8_t* packed) {
    for (int column = 0; column < kBlock; ++column) {
      for (int row = 0; row < 4; ++row) packed[place(column) * 4 + row] = rows[row][column] ^ 128;
    }
  }

  static void interleave_nibbles(const uint8_t* const rows[2], uint8_t* packed) {
    for (int column = 0; column < kBlock; ++column) {
      uint8_t* own = packed + place(column) * 4;
      for (int row = 0; row < 2; ++row) {
        own[2 * row] = rows[row][column] & 15;
        own[2 * row + 1] = rows[row][column] >> 4;
      }
    }
  }

  template <int kTile>
  static void dot(const uint8_t* packed, int64_t quads, const int8_t* activations, int64_t stride,
                  int32_t* sums, bool is_first) {
    for (int row = 0; row < kTile; ++row) {
      int32_t totals[kBlock] = {};
      const int8_t* own = activations + row * stride;
      for (int64_t quad = 0; quad < quads; ++quad) {
        const uint8_t* codes = packed + quad * 4 * kBlock;
        for (int column = 0; column < kBlock; ++column) {
          for (int input = 0; input < 4; ++input)
            totals[column] += codes[column * 4 + input] * own[quad * 4 + input];
        }
      }
      for (int column = 0; column < kBlock; ++column) {
        int32_t& sum = sums[row * kBlock + column];
        sum = is_first ? totals[column] : sum + totals[column];
      }
    }
  }

  static void dot_rows(const uint8_t* packed, int64_t quads, const int8_t* activations,
                       int64_t stride, int64_t rows, int32_t* sums, bool is_first) {
    dot_tiles<Unit, kRows>(packed, quads, activations, stride, rows, sums, is_first);
  }

  static Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
};

bool runs_here() { return true; }

void prepare(const grokctl::Product& product, int64_t first, int64_t last) {
  prepare_tokens<Unit::Number>(product, first, last);
}

void multiply(const grokctl::Product& product, const grokctl::Scratch& scratch, int64_t first,
              int64_t last) {
  multiply_blocks<Unit>(product, scratch, first, last);
}

}  // namespace

const grokctl::Form grokctl::portable = {"portable", runs_here, sizeof(Unit::Number), prepare,
                                         multiply};
