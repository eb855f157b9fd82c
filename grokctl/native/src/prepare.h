// Activations as integers of two or three signed bytes; included by the file of each form.
#ifndef GROKCTL_PREPARE_H_
#define GROKCTL_PREPARE_H_

#include "kernel.h"
#include "vectors.h"

namespace {

using grokctl::Product;

// Largest integer of two and of three bytes between -128 and 127, less what rounding may add.
constexpr float kLargest[] = {0, 0, 32600, 8355000};
// Below this, a factor would lose digits.
constexpr float kTooSmall = 1e-30f;

GROKCTL_INLINE float largest_of(const float* x, int64_t count, bool* is_finite) {
  Words most = {};
  int64_t index = 0;
  for (; index + kLanes <= count; index += kLanes) {
    // without their signs, floats are in the order of their bits; NaN is above infinity
    Words bits = load<Words>(x + index) & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits = most[lane] > bits ? most[lane] : bits;
  for (; index < count; ++index) {
    uint32_t own;
    memcpy(&own, x + index, sizeof own);
    own &= 0x7fffffffu;
    bits = own > bits ? own : bits;
  }
  *is_finite = bits < 0x7f800000u;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Stores one part of sixteen activations. Number is its type: a byte, or 16 bits where a form
// multiplies these; then the even inputs of four come before the odd ones.
template <class Number>
GROKCTL_INLINE void store_part(Number* to, Ints part) {
  typedef Number Numbers __attribute__((vector_size(16 * sizeof(Number))));
  if constexpr (sizeof(Number) == 2)
    part = GROKCTL_SHUFFLE(part, part, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  store(to, __builtin_convertvector(part, Numbers));
}

// Splits the activations of a run, and fills it up with zeros.
template <class Number, int kParts>
GROKCTL_INLINE void split_run(const float* x, int64_t count, int64_t padded, float inverse,
                              Number* to, int64_t stride, int32_t* sums, int64_t sums_stride) {
  Ints totals[kParts] = {};
  for (int64_t input = 0; input < padded; input += kLanes) {
    Floats values = {};
    if (input + kLanes <= count) {
      values = load<Floats>(x + input);
    } else if (input < count) {
      memcpy(&values, x + input, (count - input) * sizeof(float));
    }
    values = values * inverse;
    Ints rest = ints_of(values + (values < 0.0f ? Floats{} - 0.5f : Floats{} + 0.5f));
    for (int part = kParts - 1; part >= 0; --part) {
      Ints low = part == 0 ? rest : ((rest + 128) & 255) - 128;
      rest = (rest - low) >> 8;
      store_part(to + part * stride + input, low);
      totals[part] += low;
    }
  }
  for (int part = 0; part < kParts; ++part) {
    int32_t total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += totals[part][lane];
    sums[part * sums_stride] = total;
  }
}

template <class Number>
GROKCTL_INLINE void prepare_tokens(const Product& product, int64_t first, int64_t last) {
  const int64_t inputs = product.run_inputs(), padded = product.run_padded();
  const int64_t height = product.group_inputs(), runs = product.runs();
  const int64_t runs_of_group = product.runs_of_group();
  const int64_t stride = product.row_bytes / static_cast<int64_t>(sizeof(Number));
  for (int64_t token = first; token < last; ++token) {
    const float* x = product.x + token * product.inputs;
    bool is_finite;
    const float largest = largest_of(x, product.inputs, &is_finite);
    const bool is_float = !is_finite || (largest > 0 && largest < kTooSmall);
    const float limit = kLargest[product.parts];
    const float inverse = largest > 0 && !is_float ? limit / largest : 0.0f;
    product.are_floats[token] = is_float;
    product.factors[token] = is_float ? 1.0f : largest / limit;
    Number* to = reinterpret_cast<Number*>(product.bytes) + token * product.parts * stride;
    int32_t* sums = product.sums + token * product.parts * runs;
    for (int64_t run = 0; run < runs; ++run, to += padded, ++sums) {
      const int64_t start = run % runs_of_group * inputs;
      const int64_t count = is_float ? 0 : least(inputs, height - start);
      const float* from = x + run / runs_of_group * height + start;
      if (product.parts == 2) {
        split_run<Number, 2>(from, count, padded, inverse, to, stride, sums, runs);
      } else {
        split_run<Number, 3>(from, count, padded, inverse, to, stride, sums, runs);
      }
    }
  }
}

}  // namespace

#endif  // GROKCTL_PREPARE_H_
