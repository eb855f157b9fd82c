// The product for some columns, in two ways: as integers and as floats. The file of each form
// includes this, and defines for both ways a unit of `tile.h`:
//   Register, Codes, Sum       sums of one register, codes for them, and the type of a sum
//   kRows                      rows of activations whose sums fit into registers, four each
//   kFactorBytes               of a row's factors for one line of codes
//   zero, load, store, codes, factors, add
// The unit for integers also has
//   Number                     the type of one part of an activation: int8_t or int16_t
//   kQuads                     a band has a whole number of so many lines of four inputs
//   kOffset                    what `interleave_bytes` adds to a code
//   interleave_bytes(rows, packed), interleave_nibbles(rows, packed)
//                              64 columns of four inputs, in the order of `in_order`, the four of a
//                              column side by side
//   dot(packed, lines, activations, stride, rows, sums, is_first)
#ifndef GROKCTL_MULTIPLY_H_
#define GROKCTL_MULTIPLY_H_

#include "kernel.h"
#include "prepare.h"
#include "tile.h"
#include "vectors.h"

namespace {

using grokctl::Product;
using grokctl::Scratch;
using grokctl::Stored;

// Rows of activations that share a packed block.
constexpr int64_t kMostRows = 512;

GROKCTL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
GROKCTL_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Which part of a product is multiplied.
struct Place {
  int64_t token, tokens;  // the first, and how many
  int64_t group;
  int64_t input, inputs;  // of the matrix
  int64_t column, width;
};

GROKCTL_INLINE void scales_of(const Product& product, const Place& place, Floats scales[4]) {
  if (product.scales == nullptr) {
    for (int part = 0; part < 4; ++part) scales[part] = Floats{} + 1.0f;
    return;
  }
  const int64_t size = product.scales_are_wide ? 4 : 2;
  const uint8_t* from = static_cast<const uint8_t*>(product.scales) +
                        (place.group * product.outputs + place.column) * size;
  uint8_t edge[kBlock * 4] = {};
  if (place.width < kBlock) {
    memcpy(edge, from, place.width * size);
    from = edge;
  }
  for (int part = 0; part < 4; ++part) {
    scales[part] = product.scales_are_wide ? load<Floats>(from + part * 64)
                                           : widened(load<Halves>(from + part * 32));
  }
}

// Adds the scaled sums of a group to the outputs of one token.
GROKCTL_INLINE void add_group(const Product& product, const Place& place, int64_t token,
                              const Floats values[4], const Floats scales[4], float factor) {
  const bool is_first = place.group == 0, is_last = place.group == product.groups - 1;
  float* y = product.y + token * product.outputs + place.column;
  float edge[kBlock] = {};
  float* to = place.width < kBlock ? edge : y;
  if (to == edge && !is_first) memcpy(edge, y, place.width * sizeof(float));
  for (int part = 0; part < 4; ++part) {
    Floats total = values[part] * scales[part];
    if (!is_first) total = load<Floats>(to + part * kLanes) + total;
    if (is_last) total = total * factor;
    store(to + part * kLanes, total);
  }
  if (to == edge) memcpy(y, edge, place.width * sizeof(float));
}

// A stored row of a place; if it is not whole, a copy that can be read to the end of the block.
GROKCTL_INLINE const uint8_t* whole_line(const uint8_t* from, const Place& place, int64_t size,
                                         uint8_t* edge) {
  if (place.width == kBlock) return from;
  memcpy(edge, from, place.width * size);
  return edge;
}

// Work with integers: exact sums of a group, in as many rows as tokens have parts.
template <class Unit, int kParts>
struct Integers {
  static constexpr int64_t kRowsOfToken = kParts;

  // Inputs of a band: with more rows, loading and storing their sums must be rarer.
  static int64_t band(int64_t rows) { return rows <= 3 ? 16 : rows <= 12 ? 64 : 256; }

  static void pack(const Product& product, const Place& place, uint8_t* packed) {
    alignas(64) static constexpr uint8_t kZeros[kBlock] = {};
    alignas(64) uint8_t edges[4][kBlock] = {};
    const bool is_int4 = product.stored == Stored::kInt4;
    const int64_t codes = is_int4 ? 2 : 1, lines = 4 / codes;
    const int64_t rows = place.inputs / codes;
    const uint8_t* from = product.weight + place.input / codes * product.outputs + place.column;
    int64_t quads = 0;
    for (int64_t row = 0; row < rows; row += lines, ++quads) {
      const uint8_t* quad[4];
      for (int64_t line = 0; line < lines; ++line) {
        quad[line] = row + line >= rows
                         ? kZeros
                         : whole_line(from + (row + line) * product.outputs, place, 1, edges[line]);
      }
      if (is_int4) {
        Unit::interleave_nibbles(quad, packed + quads * 4 * kBlock);
      } else {
        Unit::interleave_bytes(quad, packed + quads * 4 * kBlock);
      }
    }
    for (; quads % Unit::kQuads != 0; ++quads) memset(packed + quads * 4 * kBlock, 0, 4 * kBlock);
  }

  static void dot(const Product& product, const Place& place, const uint8_t* packed, void* sums,
                  bool is_first) {
    const int64_t start = place.group * product.group_inputs();
    const int64_t offset = place.group * product.group_padded() + place.input - start;
    const int64_t stride = product.row_bytes;
    const int64_t quads =
        (place.inputs + 4 * Unit::kQuads - 1) / (4 * Unit::kQuads) * Unit::kQuads;
    const uint8_t* activations = reinterpret_cast<const uint8_t*>(product.bytes) +
                                 place.token * kParts * stride +
                                 offset * static_cast<int64_t>(sizeof(typename Unit::Number));
    Unit::dot(packed, quads, activations, stride, place.tokens * kParts,
              static_cast<int32_t*>(sums), is_first);
  }

  static void finish(const Product& product, const Place& place, const void* sums) {
    const int32_t offset = product.stored == Stored::kInt4 ? 8 : Unit::kOffset;
    Floats scales[4];
    scales_of(product, place, scales);
    for (int64_t index = 0; index < place.tokens; ++index) {
      const int64_t token = place.token + index;
      const int32_t* own = static_cast<const int32_t*>(sums) + index * kParts * kBlock;
      const int32_t* added = product.sums + token * kParts * product.groups + place.group;
      Floats values[4];
      for (int quarter = 0; quarter < 4; ++quarter) {
        Floats value = {};
        for (int part = 0; part < kParts; ++part) {
          Ints total = load<Ints>(own + part * kBlock + quarter * kLanes);
          total -= offset * added[part * product.groups];
          value = part == 0 ? floats_of(total) : value * 256.0f + floats_of(total);
        }
        values[quarter] = value;
      }
      in_order(values);
      add_group(product, place, token, values, scales, product.factors[token]);
    }
  }
};

// Work with floats.
template <class Unit>
struct FloatSums {
  static constexpr int64_t kRowsOfToken = 1;

  static int64_t band(int64_t rows) { return rows <= 4 ? 16 : 128; }

  static void pack(const Product& product, const Place& place, uint8_t* packed) {
    const int64_t codes = product.stored == Stored::kInt4 ? 2 : 1;
    const int64_t size = product.stored == Stored::kFloat32    ? 4
                         : product.stored == Stored::kBfloat16 ? 2
                                                               : 1;
    uint8_t edge[kBlock * 4] = {};
    const uint8_t* from =
        product.weight + (place.input / codes * product.outputs + place.column) * size;
    float* to = reinterpret_cast<float*>(packed);
    for (int64_t row = 0; row < place.inputs / codes; ++row, from += product.outputs * size) {
      const uint8_t* line = whole_line(from, place, size, edge);
      for (int part = 0; part < 4; ++part) {
        float* own = to + row * codes * kBlock + part * kLanes;
        switch (product.stored) {
          case Stored::kFloat32:
            store(own, load<Floats>(line + part * 64));
            break;
          case Stored::kBfloat16:
            store(own, widened(load<Halves>(line + part * 32)));
            break;
          case Stored::kInt8:
            for (int lane = 0; lane < kLanes; ++lane)
              own[lane] = static_cast<int8_t>(line[part * kLanes + lane]);
            break;
          case Stored::kInt4:
            for (int lane = 0; lane < kLanes; ++lane) {
              own[lane] = static_cast<float>((line[part * kLanes + lane] & 15) - 8);
              own[kBlock + lane] = static_cast<float>((line[part * kLanes + lane] >> 4) - 8);
            }
            break;
        }
      }
    }
  }

  static void dot(const Product& product, const Place& place, const uint8_t* packed, void* sums,
                  bool is_first) {
    const float* x = product.x + place.token * product.inputs + place.input;
    dot_tiles<Unit, Unit::kRows>(packed, place.inputs, reinterpret_cast<const uint8_t*>(x),
                                 product.inputs * 4, place.tokens, static_cast<float*>(sums),
                                 is_first);
  }

  static void finish(const Product& product, const Place& place, const void* sums) {
    Floats scales[4];
    scales_of(product, place, scales);
    for (int64_t index = 0; index < place.tokens; ++index) {
      const float* own = static_cast<const float*>(sums) + index * kBlock;
      Floats values[4];
      for (int part = 0; part < 4; ++part) values[part] = load<Floats>(own + part * kLanes);
      add_group(product, place, place.token + index, values, scales, 1.0f);
    }
  }
};

// Walks over the stored rows in bands. Of each it goes along a panel of columns, so that pages are
// read as they lie; the panel's sums stay in the cache until the end of their group.
template <class Work>
GROKCTL_INLINE void walk(const Product& product, const Scratch& scratch, int64_t token,
                         int64_t tokens, int64_t first, int64_t last) {
  const int64_t rows = tokens * Work::kRowsOfToken;
  const int64_t sums_bytes = (rows < 16 ? rows : (rows + 15) / 16 * 16) * kBlock * 4;
  const int64_t panel = most(1, scratch.sums_bytes / sums_bytes);
  const int64_t band = Work::band(rows);
  const int64_t height = product.group_inputs();
  for (int64_t start = first; start < last; start += panel) {
    for (int64_t group = 0; group < product.groups; ++group) {
      for (int64_t input = 0; input < height; input += band) {
        for (int64_t block = start; block < least(last, start + panel); ++block) {
          Place place = {token,
                         tokens,
                         group,
                         group * height + input,
                         least(band, height - input),
                         block * kBlock,
                         least(kBlock, product.outputs - block * kBlock)};
          void* sums = scratch.sums + (block - start) * sums_bytes;
          Work::pack(product, place, scratch.packed);
          Work::dot(product, place, scratch.packed, sums, input == 0);
          if (input + band >= height) Work::finish(product, place, sums);
        }
      }
    }
  }
}

template <class Work>
GROKCTL_INLINE void walk_all(const Product& product, const Scratch& scratch, int64_t first,
                             int64_t last) {
  const int64_t chunk = kMostRows / Work::kRowsOfToken;
  for (int64_t token = 0; token < product.tokens; token += chunk)
    walk<Work>(product, scratch, token, least(chunk, product.tokens - token), first, last);
}

template <class Unit, class FloatUnit>
GROKCTL_INLINE void multiply_blocks(const Product& product, const Scratch& scratch, int64_t first,
                                    int64_t last) {
  using Floating = FloatSums<FloatUnit>;
  if (product.bytes == nullptr) return walk_all<Floating>(product, scratch, first, last);
  if (product.parts == 2) {
    walk_all<Integers<Unit, 2>>(product, scratch, first, last);
  } else {
    walk_all<Integers<Unit, 3>>(product, scratch, first, last);
  }
  for (int64_t token = 0; token < product.tokens; ++token) {
    if (product.are_floats[token]) walk<Floating>(product, scratch, token, 1, first, last);
  }
}

}  // namespace

#endif  // GROKCTL_MULTIPLY_H_
