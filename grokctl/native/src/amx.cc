// The form for AMX: a tile of 16 rows of activations times 64 inputs of 16 columns. With few rows,
// `vpdpbusd` does as well.
#include "avx512.h"
#include "forms.h"
#include "processor.h"

namespace {

// Sums are tiles 0 to 3, activations 4 and 5, codes 6 and 7; all have 16 rows of 64 bytes.
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The tiles of this thread, for as long as it lives; XLA may have others here.
class Tiles {
 public:
  Tiles() {
    // the intrinsic of GCC 12 declares that it reads eight bytes, and stores to the others vanish
    asm volatile("sttilecfg %0" : "=m"(before_));
    const Config config;
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~Tiles() {
    if (before_.palette == 0) {
      _tile_release();
    } else {
      asm volatile("ldtilecfg %0" : : "m"(before_));
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  Config before_;
};

constexpr int64_t kTileRows = 16, kLine = 4 * kBlock, kTileCodes = 16 * kLine;

struct Unit : Avx512 {
  using Number = int8_t;
  using Codes = __m512i;
  static constexpr int kRows = 6, kFactorBytes = 4, kMostRows = 512, kQuads = 16;

  GROKCTL_INLINE Codes codes(const uint8_t* packed) { return _mm512_load_si512(packed); }
  GROKCTL_INLINE __m512i factors(const uint8_t* activations) { return four_bytes(activations); }
  GROKCTL_INLINE Register add(Register sums, Codes codes, __m512i factors) {
    return _mm512_dpbusd_epi32(sums, codes, factors);
  }

  // 32 rows times 32 columns of the block.
  static void dot_four(const uint8_t* packed, int64_t steps, const uint8_t* activations,
                       int64_t stride, int32_t* sums, bool is_first) {
    int32_t* below = sums + kTileRows * kBlock;
    if (is_first) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, sums, kLine);
      _tile_loadd(1, sums + 16, kLine);
      _tile_loadd(2, below, kLine);
      _tile_loadd(3, below + 16, kLine);
    }
    for (int64_t step = 0; step < steps; ++step, packed += kTileCodes, activations += 64) {
      _tile_loadd(6, packed, kLine);
      _tile_loadd(4, activations, stride);
      _tile_loadd(7, packed + 64, kLine);
      _tile_loadd(5, activations + kTileRows * stride, stride);
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
    _tile_stored(0, sums, kLine);
    _tile_stored(1, sums + 16, kLine);
    _tile_stored(2, below, kLine);
    _tile_stored(3, below + 16, kLine);
  }

  // 16 rows times the block.
  static void dot_row(const uint8_t* packed, int64_t steps, const uint8_t* activations,
                      int64_t stride, int32_t* sums, bool is_first) {
    if (is_first) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, sums, kLine);
      _tile_loadd(1, sums + 16, kLine);
      _tile_loadd(2, sums + 32, kLine);
      _tile_loadd(3, sums + 48, kLine);
    }
    for (int64_t step = 0; step < steps; ++step, packed += kTileCodes, activations += 64) {
      _tile_loadd(4, activations, stride);
      _tile_loadd(6, packed, kLine);
      _tile_dpbsud(0, 4, 6);
      _tile_loadd(7, packed + 64, kLine);
      _tile_dpbsud(1, 4, 7);
      _tile_loadd(6, packed + 128, kLine);
      _tile_dpbsud(2, 4, 6);
      _tile_loadd(7, packed + 192, kLine);
      _tile_dpbsud(3, 4, 7);
    }
    _tile_stored(0, sums, kLine);
    _tile_stored(1, sums + 16, kLine);
    _tile_stored(2, sums + 32, kLine);
    _tile_stored(3, sums + 48, kLine);
  }

  static void dot(const uint8_t* packed, int64_t lines, const uint8_t* activations, int64_t stride,
                  int64_t rows, int32_t* sums, bool is_first) {
    if (rows < kTileRows) {
      dot_tiles<Unit, kRows>(packed, lines, activations, stride, rows, sums, is_first);
      return;
    }
    const int64_t steps = lines / 16;
    int64_t row = 0;
    for (; row + kTileRows < rows; row += 2 * kTileRows) {
      const uint8_t* own = activations + row * stride;
      dot_four(packed, steps, own, stride, sums + row * kBlock, is_first);
      dot_four(packed + 128, steps, own, stride, sums + row * kBlock + 32, is_first);
    }
    if (row < rows)
      dot_row(packed, steps, activations + row * stride, stride, sums + row * kBlock, is_first);
  }
};

bool runs_here() { return grokctl::processor().amx_int8; }

void prepare(const grokctl::Product& product, int64_t first, int64_t last) {
  prepare_tokens<Unit::Number>(product, first, last);
}

void multiply(const grokctl::Product& product, const grokctl::Scratch& scratch,
              const grokctl::Part& part) {
  const Tiles tiles;
  multiply_part<Unit, FloatUnit>(product, scratch, part);
}

void activate(float* gate, const float* up, int64_t count) { activate_all(gate, up, count); }

void multiply_back(const grokctl::Back& back, int64_t first, int64_t last) {
  multiply_back_rows(back, first, last);
}

}  // namespace

const grokctl::Form grokctl::amx = {
    "amx", runs_here, sizeof(Unit::Number), grokctl::kAnyRows,
    prepare, multiply, activate, multiply_back,
};
