// The form for NEON with dot products: `sdot` multiplies 16 pairs of bytes and adds fours of them.
#include "forms.h"
#include "neon.h"
#include "processor.h"

namespace {

struct Unit : Neon {
  static constexpr int kQuads = 1;

  static void dot(const uint8_t* packed, int64_t lines, const uint8_t* activations, int64_t stride,
                  int64_t rows, int32_t* sums, bool is_first) {
    dot_tiles<Unit, kRows>(packed, lines, activations, stride, rows, sums, is_first);
  }
};

bool runs_here() { return grokctl::processor().dotprod; }

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

const grokctl::Form grokctl::neon_dotprod = {
    "neon_dotprod", runs_here, sizeof(Unit::Number), grokctl::kAnyRows,
    prepare, multiply, activate, multiply_back,
};
