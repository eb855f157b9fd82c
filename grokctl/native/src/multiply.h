// The product for some columns, in two ways: as integers and as floats. The file of each form
// includes this, and defines for both ways a unit of `tile.h`:
//   Register, Codes, Sum       sums of one register, codes for them, and the type of a sum
//   kRows                      rows of activations whose sums fit into registers, four each
//   kFactorBytes               of a row's factors for one line of codes
//   zero, load, store, codes, factors, add
// The unit for integers also has
//   Number                     the type of one part of an activation: int8_t or int16_t
//   kMostRows                  of activations that share a packed block
//   kQuads                     with 16 rows and more, a band has a multiple of so many lines of four
//                              inputs
//   kOffset                    what `interleave_bytes` adds to a code
//   interleave_bytes(rows, packed), interleave_nibbles(rows, packed)
//                              64 columns of four inputs, in the order that `transpose_quarters`
//                              changes, the four of a column side by side
//   dot(packed, lines, activations, stride, rows, sums, is_first)
#ifndef GROKCTL_MULTIPLY_H_
#define GROKCTL_MULTIPLY_H_

#include "activate.h"
#include "back.h"
#include "kernel.h"
#include "prepare.h"
#include "tile.h"
#include "vectors.h"

namespace {

using grokctl::Part;
using grokctl::Product;
using grokctl::Scratch;
using grokctl::Stored;

// Rows of activations that share a packed block.
constexpr int64_t kMostRows = 256;

// Rows of sums that a product writes: with many, a tile may be written beyond the last.
GROKCTL_INLINE int64_t rounded_rows(int64_t rows) {
  return rows < 16 ? rows : (rows + 31) / 32 * 32;
}

// Where the work stands.
struct Place {
  int64_t token, tokens;  // the first, and how many
  int64_t run;
  int64_t offset;         // of the first input in the run
  int64_t input, inputs;  // of the matrix
  int64_t column, width;
  int64_t ahead;  // inputs from here to those that are read next: the processor fetches them now

  // Fewer of the inputs, from one of them on.
  GROKCTL_MEMBER Place slice(int64_t start, int64_t count) const {
    Place part = *this;
    part.input += start;
    part.inputs = least(count, inputs - start);
    return part;
  }
};

GROKCTL_INLINE void scales_of(const Product& product, const Place& place, Floats scales[4]) {
  if (product.scales == nullptr) {
    for (int part = 0; part < 4; ++part) scales[part] = Floats{} + 1.0f;
    return;
  }
  const int64_t size = product.scales_are_wide ? 4 : 2;
  const uint8_t* from = static_cast<const uint8_t*>(product.scales) +
                        (place.run / product.runs_of_group() * product.outputs + place.column) * size;
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

// Adds the scaled sums of a run to those of its segment.
GROKCTL_INLINE void add_run(const Floats values[4], const Floats scales[4], float* totals,
                            bool is_first) {
  for (int part = 0; part < 4; ++part) {
    float* own = totals + part * kLanes;
    const Floats scaled = values[part] * scales[part];
    store(own, is_first ? scaled : load<Floats>(own) + scaled);
  }
}

// Adds the sums of a segment to the outputs of all tokens.
template <class Work>
GROKCTL_INLINE void add_segment(const Product& product, const Place& place, const float* totals,
                                int64_t segment) {
  const bool is_first = segment == 0 || product.partial != nullptr;
  const bool is_last = segment == product.segments() - 1 && product.partial == nullptr;
  for (int64_t index = 0; index < place.tokens; ++index) {
    const int64_t token = place.token + index;
    float* y = product.partial == nullptr
                   ? product.y + token * product.outputs
                   : product.partial + (segment * product.tokens + token) * product.outputs;
    y += place.column;
    const float factor = is_last && product.factors != nullptr ? product.factors[token] : 1.0f;
    Floats values[4];
    for (int part = 0; part < 4; ++part)
      values[part] = load<Floats>(totals + index * kBlock + part * kLanes);
    if (Work::kIsInterleaved) transpose_quarters(values);
    float edge[kBlock] = {};
    float* to = place.width < kBlock ? edge : y;
    if (to == edge && !is_first) memcpy(edge, y, place.width * sizeof(float));
    for (int part = 0; part < 4; ++part) {
      if (!is_first) values[part] = load<Floats>(to + part * kLanes) + values[part];
      store(to + part * kLanes, values[part] * factor);
    }
    if (to == edge) memcpy(y, edge, place.width * sizeof(float));
  }
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
  static constexpr int64_t kRowsOfToken = kParts, kMostRows = Unit::kMostRows;
  static constexpr int64_t kPackedSize = 1;  // bytes of a code in a packed block
  static constexpr bool kIsInterleaved = true;

  static int64_t padded_quads(const Place& place) {
    const int64_t unit = place.tokens * kParts < 16 ? 1 : Unit::kQuads;
    return (place.inputs + 4 * unit - 1) / (4 * unit) * unit;
  }

  // Inputs of a band: with more rows, loading and storing their sums must be rarer.
  static int64_t band(int64_t rows) { return rows <= 8 ? 16 : rows <= 48 ? 64 : 256; }

  static void pack(const Product& product, const Place& place, uint8_t* packed) {
    if (product.stored == Stored::kInt4) {
      pack_lines<2>(product, place, packed);
    } else {
      pack_lines<1>(product, place, packed);
    }
  }

  // Of stored rows with so many codes in a byte, those of four inputs at a time.
  template <int kCodes>
  GROKCTL_INLINE void pack_lines(const Product& product, const Place& place, uint8_t* packed) {
    constexpr int64_t kLines = 4 / kCodes;
    const int64_t rows = place.inputs / kCodes, stride = product.outputs;
    const uint8_t* from = product.weight + place.input / kCodes * stride + place.column;
    const uint8_t* ahead = from + place.ahead / kCodes * stride;
    int64_t row = 0;
    if (place.width == kBlock) {
      for (; row + kLines <= rows; row += kLines) {
        const uint8_t* lines[kLines];
        for (int64_t line = 0; line < kLines; ++line, from += stride, ahead += stride) {
          __builtin_prefetch(ahead, 0, 2);
          lines[line] = from;
        }
        interleave<kCodes>(lines, packed);
        packed += 4 * kBlock;
      }
    }
    for (; row < rows; row += kLines) {
      alignas(64) uint8_t edges[kLines][kBlock] = {};
      const uint8_t* lines[kLines];
      for (int64_t line = 0; line < kLines; ++line, from += stride) {
        if (row + line < rows) memcpy(edges[line], from, place.width);
        lines[line] = edges[line];
      }
      interleave<kCodes>(lines, packed);
      packed += 4 * kBlock;
    }
  }

  template <int kCodes>
  GROKCTL_INLINE void interleave(const uint8_t* const* lines, uint8_t* packed) {
    if constexpr (kCodes == 1) {
      Unit::interleave_bytes(lines, packed);
    } else {
      Unit::interleave_nibbles(lines, packed);
    }
  }

  static void dot(const Product& product, const Place& place, const uint8_t* packed, void* sums,
                  bool is_first) {
    const int64_t offset = place.run * product.run_padded() + place.offset;
    const int64_t stride = product.row_bytes;
    const uint8_t* activations = reinterpret_cast<const uint8_t*>(product.bytes) +
                                 place.token * kParts * stride +
                                 offset * static_cast<int64_t>(sizeof(typename Unit::Number));
    Unit::dot(packed, padded_quads(place), activations, stride, place.tokens * kParts,
              static_cast<int32_t*>(sums), is_first);
  }

  static void finish(const Product& product, const Place& place, const void* sums, float* totals,
                     bool is_first) {
    const int32_t offset = product.stored == Stored::kInt4 ? 8 : Unit::kOffset;
    const int64_t runs = product.runs();
    Floats scales[4];
    scales_of(product, place, scales);
    transpose_quarters(scales);
    for (int64_t index = 0; index < place.tokens; ++index) {
      const int32_t* own = static_cast<const int32_t*>(sums) + index * kParts * kBlock;
      const int32_t* added = product.sums + (place.token + index) * kParts * runs + place.run;
      Floats values[4];
      for (int quarter = 0; quarter < 4; ++quarter) {
        Floats value = {};
        for (int part = 0; part < kParts; ++part) {
          const Ints total =
              load<Ints>(own + part * kBlock + quarter * kLanes) - offset * added[part * runs];
          value = part == 0 ? floats_of(total) : value * 256.0f + floats_of(total);
        }
        values[quarter] = value;
      }
      add_run(values, scales, totals + index * kBlock, is_first);
    }
  }
};

// Work with floats.
template <class Unit>
struct FloatSums {
  static constexpr int64_t kRowsOfToken = 1, kMostRows = 256;
  static constexpr int64_t kPackedSize = 4;
  static constexpr bool kIsInterleaved = false;

  static int64_t band(int64_t rows) { return rows <= 4 ? 16 : 64; }

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
      for (int64_t part = 0; part < size; ++part)
        __builtin_prefetch(from + place.ahead / codes * product.outputs * size + part * 64, 0, 2);
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

  static void finish(const Product& product, const Place& place, const void* sums, float* totals,
                     bool is_first) {
    Floats scales[4];
    scales_of(product, place, scales);
    for (int64_t index = 0; index < place.tokens; ++index) {
      const float* own = static_cast<const float*>(sums) + index * kBlock;
      Floats values[4];
      for (int part = 0; part < 4; ++part) values[part] = load<Floats>(own + part * kLanes);
      add_run(values, scales, totals + index * kBlock, is_first);
    }
  }
};

// Stored rows that are read together. More would push each other out of the cache before they are
// used: in a matrix of 32,768 columns, the lines of a column lie in a few of its sets.
constexpr int64_t kSliceRows = 16;

// Multiplies what lies packed, and at the end of a run adds its sums.
template <class Work>
GROKCTL_INLINE void multiply_packed(const Product& product, const Scratch& scratch,
                                    const Place& place, uint8_t* packed, int64_t index,
                                    bool is_first, bool is_last) {
  void* sums =
      scratch.sums + index * rounded_rows(place.tokens * Work::kRowsOfToken) * kBlock * 4;
  Work::dot(product, place, packed, sums, place.offset == 0);
  if (is_last)
    Work::finish(product, place, sums, scratch.totals + index * place.tokens * kBlock, is_first);
}

GROKCTL_INLINE void go_to(const Product& product, int64_t block, Place& place) {
  place.column = block * kBlock;
  place.width = least(kBlock, product.outputs - place.column);
}

// One run of a panel: walks over the stored rows in bands, and along the panel in slices of a band,
// so that pages are read as they lie. The panel's sums stay in the cache, and so do its codes in a
// band of several slices.
template <class Work>
GROKCTL_INLINE void walk_run(const Product& product, const Scratch& scratch, Place place,
                             int64_t first, int64_t last, bool is_first) {
  const int64_t band = Work::band(place.tokens * Work::kRowsOfToken);
  const int64_t slice = kSliceRows * (product.stored == Stored::kInt4 ? 2 : 1);
  const int64_t start = place.run % product.runs_of_group() * product.run_inputs();
  const int64_t count = least(product.run_inputs(), product.group_inputs() - start);
  const int64_t from = place.run / product.runs_of_group() * product.group_inputs() + start;
  for (place.offset = 0; place.offset < count; place.offset += band) {
    place.input = from + place.offset;
    place.inputs = least(band, count - place.offset);
    const bool is_last = place.offset + band >= count;
    if (band <= slice) {
      place.ahead = band;
      for (int64_t block = first; block < last; ++block) {
        go_to(product, block, place);
        Work::pack(product, place, scratch.packed);
        multiply_packed<Work>(product, scratch, place, scratch.packed, block - first, is_first,
                              is_last);
      }
      continue;
    }
    place.ahead = slice;
    const int64_t block_bytes = band * kBlock * Work::kPackedSize;
    for (int64_t begin = 0; begin < place.inputs; begin += slice) {
      for (int64_t block = first; block < last; ++block) {
        go_to(product, block, place);
        Work::pack(product, place.slice(begin, slice),
                   scratch.packed + (block - first) * block_bytes +
                       begin * kBlock * Work::kPackedSize);
      }
    }
    for (int64_t block = first; block < last; ++block) {
      go_to(product, block, place);
      multiply_packed<Work>(product, scratch, place, scratch.packed + (block - first) * block_bytes,
                            block - first, is_first, is_last);
    }
  }
}

template <class Work>
GROKCTL_INLINE void walk(const Product& product, const Scratch& scratch, int64_t token,
                         int64_t tokens, const Part& part) {
  Place place = {};
  place.token = token;
  place.tokens = tokens;
  const int64_t rows = tokens * Work::kRowsOfToken;
  const int64_t packed = Work::band(rows) * kBlock * Work::kPackedSize;
  const int64_t panel = most(1, least(grokctl::kSumsBytes / (rounded_rows(rows) * kBlock * 4),
                                      grokctl::kPackedBytes / packed));
  for (int64_t first = part.first_block; first < part.last_block; first += panel) {
    const int64_t last = least(part.last_block, first + panel);
    for (int64_t segment = part.first_segment; segment < part.last_segment; ++segment) {
      const int64_t first_run = product.first_run(segment);
      for (place.run = first_run; place.run < product.first_run(segment + 1); ++place.run)
        walk_run<Work>(product, scratch, place, first, last, place.run == first_run);
      for (int64_t block = first; block < last; ++block) {
        go_to(product, block, place);
        add_segment<Work>(product, place, scratch.totals + (block - first) * tokens * kBlock, segment);
      }
    }
  }
}

template <class Work>
GROKCTL_INLINE void walk_all(const Product& product, const Scratch& scratch, const Part& part) {
  const int64_t chunk = Work::kMostRows / Work::kRowsOfToken;
  for (int64_t token = 0; token < product.tokens; token += chunk)
    walk<Work>(product, scratch, token, least(chunk, product.tokens - token), part);
}

template <class Unit, class FloatUnit>
GROKCTL_INLINE void multiply_part(const Product& product, const Scratch& scratch,
                                  const Part& part) {
  using Floating = FloatSums<FloatUnit>;
  if (product.bytes == nullptr) return walk_all<Floating>(product, scratch, part);
  if (product.parts == 2) {
    walk_all<Integers<Unit, 2>>(product, scratch, part);
  } else {
    walk_all<Integers<Unit, 3>>(product, scratch, part);
  }
  for (int64_t token = 0; token < product.tokens; ++token) {
    if (product.are_floats[token]) walk<Floating>(product, scratch, token, 1, part);
  }
}

}  // namespace

#endif  // GROKCTL_MULTIPLY_H_
