// The form for AVX-512 with VNNI: `vpdpbusd` multiplies 64 pairs of bytes and adds fours of them.
#include "avx512.h"
#include "forms.h"
#include "processor.h"

namespace {

struct Unit : Avx512 {
  using Number = int8_t;
  using Codes = __m512i;
  static constexpr int kRows = 6, kFactorBytes = 4;

  GROKCTL_INLINE Codes codes(const uint8_t* packed) { return _mm512_load_si512(packed); }
  GROKCTL_INLINE __m512i factors(const uint8_t* activations) { return four_bytes(activations); }
  GROKCTL_INLINE Register add(Register sums, Codes codes, __m512i factors) {
    return _mm512_dpbusd_epi32(sums, codes, factors);
  }

  static void dot(const uint8_t* packed, int64_t lines, const uint8_t* activations, int64_t stride,
                  int64_t rows, int32_t* sums, bool is_first) {
    dot_tiles<Unit, kRows>(packed, lines, activations, stride, rows, sums, is_first);
  }
};

bool runs_here() { return grokctl::processor().avx512vnni; }

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

const grokctl::Form grokctl::avx512vnni = {
    "avx512vnni", runs_here, sizeof(Unit::Number), grokctl::kAnyRows,
    prepare, multiply, activate, multiply_back,
};
