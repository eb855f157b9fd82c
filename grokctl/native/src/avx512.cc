// The form for AVX-512 without VNNI: `vpmaddwd` multiplies pairs of 16 bits, exactly.
#include "avx512.h"
#include "forms.h"
#include "processor.h"

namespace {

struct Unit : Avx512 {
  using Number = int16_t;
  struct Codes {
    __m512i even, odd;
  };
  static constexpr int kRows = 4, kFactorBytes = 8;

  GROKCTL_INLINE Codes codes(const uint8_t* packed) {
    const __m512i both = _mm512_load_si512(packed);
    return {_mm512_and_si512(both, _mm512_set1_epi16(255)), _mm512_srli_epi16(both, 8)};
  }
  GROKCTL_INLINE Codes factors(const uint8_t* activations) {
    return {four_bytes(activations), four_bytes(activations + 4)};
  }
  GROKCTL_INLINE Register add(Register sums, Codes codes, Codes factors) {
    const __m512i even = _mm512_madd_epi16(codes.even, factors.even);
    const __m512i odd = _mm512_madd_epi16(codes.odd, factors.odd);
    return _mm512_add_epi32(sums, _mm512_add_epi32(even, odd));
  }

  static void dot(const uint8_t* packed, int64_t lines, const uint8_t* activations, int64_t stride,
                  int64_t rows, int32_t* sums, bool is_first) {
    dot_tiles<Unit, kRows>(packed, lines, activations, stride, rows, sums, is_first);
  }
};

bool runs_here() { return grokctl::processor().avx512; }

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

const grokctl::Form grokctl::avx512 = {
    "avx512", runs_here, sizeof(Unit::Number), 24,
    prepare, multiply, activate, multiply_back,
};
