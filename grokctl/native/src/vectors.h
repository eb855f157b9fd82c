// Vectors of sixteen numbers, which the compiler maps to whatever registers there are.
#ifndef GROKCTL_VECTORS_H_
#define GROKCTL_VECTORS_H_

#include <cstdint>
#include <cstring>

#include "kernel.h"


namespace {

typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

constexpr int kLanes = 16;

GROKCTL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
GROKCTL_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

template <class Vector>
GROKCTL_INLINE Vector load(const void* from) {
  Vector vector;
  memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class Vector>
GROKCTL_INLINE void store(void* to, Vector vector) {
  memcpy(to, &vector, sizeof vector);
}

GROKCTL_INLINE Floats floats_of(Ints values) { return __builtin_convertvector(values, Floats); }
GROKCTL_INLINE Ints ints_of(Floats values) { return __builtin_convertvector(values, Ints); }

GROKCTL_INLINE Floats floats_of_bits(Words bits) {
  Floats values;
  memcpy(&values, &bits, sizeof values);
  return values;
}

// bfloat16 is the upper half of float32.
GROKCTL_INLINE Floats widened(Halves bits) {
  return floats_of_bits(__builtin_convertvector(bits, Words) << 16);
}

#if defined(__clang__) || __GNUC__ >= 12
#define GROKCTL_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define GROKCTL_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// From the order of interleaved columns to their own, and back: quarter l of vector j changes places
// with quarter j of vector l.
GROKCTL_INLINE void transpose_quarters(Floats values[4]) {
  Floats a = GROKCTL_SHUFFLE(values[0], values[1], 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21,
                             22, 23);
  Floats b = GROKCTL_SHUFFLE(values[2], values[3], 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21,
                             22, 23);
  Floats c = GROKCTL_SHUFFLE(values[0], values[1], 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28,
                             29, 30, 31);
  Floats d = GROKCTL_SHUFFLE(values[2], values[3], 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28,
                             29, 30, 31);
  values[0] = GROKCTL_SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  values[1] = GROKCTL_SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  values[2] = GROKCTL_SHUFFLE(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  values[3] = GROKCTL_SHUFFLE(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

}  // namespace

#endif  // GROKCTL_VECTORS_H_
