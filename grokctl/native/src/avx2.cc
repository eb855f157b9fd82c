// The form for AVX2: `vpmaddwd` multiplies pairs of 16 bits, exactly; `vpmaddubsw` would saturate.
#include "avx2.h"
#include "forms.h"
#include "processor.h"

namespace {

struct Unit : Avx2 {
  using Number = int16_t;
  struct Codes {
    __m256i even, odd;
  };
  static constexpr int kRows = 2, kFactorBytes = 8;

  GROKCTL_INLINE Codes codes(const uint8_t* packed) {
    const __m256i both = load_256(packed);
    return {_mm256_and_si256(both, _mm256_set1_epi16(255)), _mm256_srli_epi16(both, 8)};
  }
  GROKCTL_INLINE Codes factors(const uint8_t* activations) {
    return {four_bytes(activations), four_bytes(activations + 4)};
  }
  GROKCTL_INLINE Register add(Register sums, Codes codes, Codes factors) {
    const __m256i even = _mm256_madd_epi16(codes.even, factors.even);
    const __m256i odd = _mm256_madd_epi16(codes.odd, factors.odd);
    return _mm256_add_epi32(sums, _mm256_add_epi32(even, odd));
  }

  static void dot(const uint8_t* packed, int64_t lines, const uint8_t* activations, int64_t stride,
                  int64_t rows, int32_t* sums, bool is_first) {
    dot_tiles<Unit, kRows>(packed, lines, activations, stride, rows, sums, is_first);
  }
};

bool runs_here() { return grokctl::processor().avx2; }

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

const grokctl::Form grokctl::avx2 = {
    "avx2", runs_here, sizeof(Unit::Number), 16,
    prepare, multiply, activate, multiply_back,
};
