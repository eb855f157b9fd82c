// Sums in registers. A row is a type with the rows below it as a member, and no array: compilers
// keep arrays of registers in memory.
#ifndef GROKCTL_TILE_H_
#define GROKCTL_TILE_H_

#include "kernel.h"
#include "vectors.h"

namespace {

using grokctl::kBlock;

// Four registers of codes, each code times the factors of a row.
template <class Unit>
struct Line {
  typename Unit::Codes a, b, c, d;

  GROKCTL_MEMBER void load(const uint8_t* packed) {
    constexpr int kBytes = sizeof(typename Unit::Register);
    a = Unit::codes(packed);
    b = Unit::codes(packed + kBytes);
    c = Unit::codes(packed + 2 * kBytes);
    d = Unit::codes(packed + 3 * kBytes);
  }
};

template <class Unit, int kRows>
struct Tile {
  using Register = typename Unit::Register;
  static constexpr int kWidth = sizeof(Register) / 4;

  Register a, b, c, d;
  Tile<Unit, kRows - 1> below;

  GROKCTL_MEMBER void clear() {
    a = b = c = d = Unit::zero();
    below.clear();
  }

  GROKCTL_MEMBER void load(const typename Unit::Sum* sums) {
    a = Unit::load(sums);
    b = Unit::load(sums + kWidth);
    c = Unit::load(sums + 2 * kWidth);
    d = Unit::load(sums + 3 * kWidth);
    below.load(sums + kBlock);
  }

  GROKCTL_MEMBER void store(typename Unit::Sum* sums) const {
    Unit::store(sums, a);
    Unit::store(sums + kWidth, b);
    Unit::store(sums + 2 * kWidth, c);
    Unit::store(sums + 3 * kWidth, d);
    below.store(sums + kBlock);
  }

  GROKCTL_MEMBER void plus(const Tile& other) {
    a = a + other.a;
    b = b + other.b;
    c = c + other.c;
    d = d + other.d;
    below.plus(other.below);
  }

  // Adds a line of codes times each row's own factors.
  GROKCTL_MEMBER void add(const Line<Unit>& line, const uint8_t* activations, int64_t stride) {
    const auto factors = Unit::factors(activations);
    a = Unit::add(a, line.a, factors);
    b = Unit::add(b, line.b, factors);
    c = Unit::add(c, line.c, factors);
    d = Unit::add(d, line.d, factors);
    below.add(line, activations + stride, stride);
  }
};

template <class Unit>
struct Tile<Unit, 0> {
  GROKCTL_MEMBER void clear() {}
  GROKCTL_MEMBER void load(const typename Unit::Sum*) {}
  GROKCTL_MEMBER void store(typename Unit::Sum*) const {}
  GROKCTL_MEMBER void plus(const Tile&) {}
  GROKCTL_MEMBER void add(const Line<Unit>&, const uint8_t*, int64_t) {}
};

// Lines of packed codes times a few rows of activations, added to the sums unless they are the first.
// Floats begin at zero all the same: long sums would lose digits.
template <class Unit, int kRows>
GROKCTL_INLINE void dot_tile(const uint8_t* packed, int64_t lines, const uint8_t* activations,
                             int64_t stride, typename Unit::Sum* sums, bool is_first) {
  constexpr int kBytes = 4 * sizeof(typename Unit::Register);  // of a block, four registers at once
  constexpr int kSlices = 4 * kBlock / kBytes;
  for (int slice = 0; slice < kSlices; ++slice) {
    constexpr bool kIsExact = static_cast<typename Unit::Sum>(0.5f) == 0;
    Tile<Unit, kRows> tile;
    if (is_first || !kIsExact) {
      tile.clear();
    } else {
      tile.load(sums + slice * kBytes / 4);
    }
    const uint8_t* own = packed + slice * kBytes;
    const uint8_t* factors = activations;
    for (int64_t index = 0; index < lines; ++index) {
      Line<Unit> line;
      line.load(own);
      tile.add(line, factors, stride);
      own += 4 * kBlock;
      factors += Unit::kFactorBytes;
    }
    if constexpr (!kIsExact) {
      if (!is_first) {
        Tile<Unit, kRows> before;
        before.load(sums + slice * kBytes / 4);
        tile.plus(before);
      }
    }
    tile.store(sums + slice * kBytes / 4);
  }
}

// Rows of activations in tiles, the last ones in a smaller tile.
template <class Unit, int kRows>
GROKCTL_INLINE void dot_tiles(const uint8_t* packed, int64_t lines, const uint8_t* activations,
                              int64_t stride, int64_t rows, typename Unit::Sum* sums,
                              bool is_first) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    dot_tile<Unit, kRows>(packed, lines, activations + row * stride, stride, sums + row * kBlock,
                          is_first);
  }
  if constexpr (kRows > 1) {
    if (row < rows) {
      dot_tiles<Unit, kRows - 1>(packed, lines, activations + row * stride, stride, rows - row,
                                 sums + row * kBlock, is_first);
    }
  }
}

}  // namespace

#endif  // GROKCTL_TILE_H_
