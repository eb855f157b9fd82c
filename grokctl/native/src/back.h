// The product with the transpose of the embedding: sums along its rows, which lie as they are read.
// Included by the file of each form.
#ifndef GROKCTL_BACK_H_
#define GROKCTL_BACK_H_

#include "kernel.h"
#include "vectors.h"

namespace {

using grokctl::Back;

// Sums of a row times so many tokens; no array, as in `tile.h`.
template <int kTokens>
struct Along {
  Floats total = {};
  Along<kTokens - 1> below;

  GROKCTL_MEMBER void add(Floats row, const float* x, int64_t stride) {
    total = total + row * load<Floats>(x);
    below.add(row, x + stride, stride);
  }

  GROKCTL_MEMBER void store(float* y, int64_t stride, const float* rest) const {
    float sum = *rest;
    for (int lane = 0; lane < kLanes; ++lane) sum += total[lane];
    *y = sum;
    below.store(y + stride, stride, rest + 1);
  }
};

template <>
struct Along<0> {
  GROKCTL_MEMBER void add(Floats, const float*, int64_t) {}
  GROKCTL_MEMBER void store(float*, int64_t, const float*) const {}
};

template <bool kIsWide>
GROKCTL_INLINE Floats part_of_row(const uint8_t* row, int64_t input) {
  if constexpr (kIsWide) {
    return load<Floats>(row + input * 4);
  } else {
    return widened(load<Halves>(row + input * 2));
  }
}

template <bool kIsWide>
GROKCTL_INLINE float number_of_row(const uint8_t* row, int64_t input) {
  if constexpr (kIsWide) {
    float value;
    memcpy(&value, row + input * 4, sizeof value);
    return value;
  } else {
    uint16_t bits;
    memcpy(&bits, row + input * 2, sizeof bits);
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
  }
}

template <bool kIsWide, int kTokens>
GROKCTL_INLINE void along_row(const Back& back, const uint8_t* row, const float* x, float* y) {
  Along<kTokens> sums;
  int64_t input = 0;
  for (; input + kLanes <= back.inputs; input += kLanes)
    sums.add(part_of_row<kIsWide>(row, input), x + input, back.inputs);
  float rest[kTokens] = {};
  for (; input < back.inputs; ++input) {
    for (int token = 0; token < kTokens; ++token)
      rest[token] += number_of_row<kIsWide>(row, input) * x[token * back.inputs + input];
  }
  sums.store(y, back.rows, rest);
}

template <bool kIsWide>
GROKCTL_INLINE void along_rows(const Back& back, int64_t first, int64_t last) {
  const int64_t nbytes = back.inputs * (kIsWide ? 4 : 2);
  for (int64_t index = first; index < last; ++index) {
    const uint8_t* row = back.weight + index * nbytes;
    int64_t token = 0;
    const float* x = back.x;
    float* y = back.y + index;
    for (; token + 4 <= back.tokens; token += 4, x += 4 * back.inputs, y += 4 * back.rows)
      along_row<kIsWide, 4>(back, row, x, y);
    for (; token < back.tokens; ++token, x += back.inputs, y += back.rows)
      along_row<kIsWide, 1>(back, row, x, y);
  }
}

GROKCTL_INLINE void multiply_back_rows(const Back& back, int64_t first, int64_t last) {
  if (back.is_wide) {
    along_rows<true>(back, first, last);
  } else {
    along_rows<false>(back, first, last);
  }
}

}  // namespace

#endif  // GROKCTL_BACK_H_
