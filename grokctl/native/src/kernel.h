// What the parts of the kernel know of each other: a product, and the forms of an instruction set.
#ifndef GROKCTL_KERNEL_H_
#define GROKCTL_KERNEL_H_

#include <cstddef>
#include <cstdint>

namespace grokctl {

// Columns that are multiplied together: a cache line of bytes.
constexpr int64_t kBlock = 64;
// Inputs of a scale group are padded to a whole number of these, so that every form can read on.
constexpr int64_t kPad = 64;
// int32 holds the sum of this many products of two bytes.
constexpr int64_t kLongestRun = 32768;

enum class Stored { kInt8, kInt4, kBfloat16, kFloat32 };

// A product of activations with one stored matrix: y = x @ dequantised.
struct Product {
  Stored stored;
  const uint8_t* weight;  // (inputs, outputs); of int4, (inputs / 2, outputs), the even input low
  const void* scales;     // (groups, outputs); null: none
  bool scales_are_wide;   // float32, or the bits of bfloat16
  int64_t inputs;
  int64_t outputs;
  int64_t groups;
  const float* x;  // (tokens, inputs)
  int64_t tokens;
  int parts;  // bytes of an activation: x = factor * (256 * high + low), or three
  float* y;   // (tokens, outputs)

  // Activations as integers, filled by `prepare`; null where floats are multiplied.
  int8_t* bytes;        // (tokens, parts, groups, padded inputs of a group)
  int64_t row_bytes;    // of one part of one token
  int32_t* sums;        // (tokens, parts, groups)
  float* factors;       // (tokens)
  uint8_t* are_floats;  // (tokens) which cannot be integers: not finite, or too small

  int64_t group_inputs() const { return inputs / groups; }
  int64_t group_padded() const { return (group_inputs() + kPad - 1) / kPad * kPad; }
  int64_t blocks() const { return (outputs + kBlock - 1) / kBlock; }
  bool is_integer() const { return stored == Stored::kInt8 || stored == Stored::kInt4; }
};

// Memory of one thread.
struct Scratch {
  uint8_t* packed;
  uint8_t* sums;
  int64_t sums_bytes;
};
constexpr int64_t kPackedBytes = 64 * 1024;
constexpr int64_t kSumsBytes = 512 * 1024;

// The product in one instruction set. All give the same integers.
struct Form {
  const char* name;
  bool (*runs_here)();
  int activation_bytes;  // of one number of `bytes`
  // Converts activations of tokens [first, last).
  void (*prepare)(const Product& product, int64_t first, int64_t last);
  // Multiplies for columns of blocks [first, last).
  void (*multiply)(const Product& product, const Scratch& scratch, int64_t first, int64_t last);
};

}  // namespace grokctl

#endif  // GROKCTL_KERNEL_H_
