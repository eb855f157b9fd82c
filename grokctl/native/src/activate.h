// The function between the products of an expert; included by the file of each form.
#ifndef GROKCTL_ACTIVATE_H_
#define GROKCTL_ACTIVATE_H_

#include "vectors.h"

namespace {

// e^x, to two units of the last place; the polynomial of Cephes' expf.
GROKCTL_INLINE Floats exp_of(Floats x) {
  x = x > 88.0f ? Floats{} + 88.0f : x;
  x = x < -87.0f ? Floats{} - 87.0f : x;
  const Floats scaled = x * 1.44269504f;
  const Ints power = ints_of(scaled + (scaled < 0.0f ? Floats{} - 0.5f : Floats{} + 0.5f));
  const Floats whole = floats_of(power);
  const Floats rest = x - whole * 0.693359375f - whole * -2.12194440e-4f;
  Floats sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  return sum * floats_of_bits((Words)((power + 127) << 23));
}

// gelu(gate) * up, with the tanh form of gelu: x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)).
GROKCTL_INLINE Floats activated(Floats gate, Floats up) {
  const Floats inner = (gate + gate * gate * gate * 0.044715f) * 0.7978845608f;
  return gate * (1.0f / (exp_of(inner * -2.0f) + 1.0f)) * up;
}

// Writes over `gate`.
GROKCTL_INLINE void activate_all(float* gate, const float* up, int64_t count) {
  int64_t index = 0;
  for (; index + kLanes <= count; index += kLanes)
    store(gate + index, activated(load<Floats>(gate + index), load<Floats>(up + index)));
  if (index == count) return;
  float edges[2][kLanes] = {};
  memcpy(edges[0], gate + index, (count - index) * sizeof(float));
  memcpy(edges[1], up + index, (count - index) * sizeof(float));
  store(edges[0], activated(load<Floats>(edges[0]), load<Floats>(edges[1])));
  memcpy(gate + index, edges[0], (count - index) * sizeof(float));
}

}  // namespace

#endif  // GROKCTL_ACTIVATE_H_
