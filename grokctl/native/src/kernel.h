// What the parts of the kernel know of each other: a product, and the forms of an instruction set.
#ifndef GROKCTL_KERNEL_H_
#define GROKCTL_KERNEL_H_

#include <cstddef>
#include <cstdint>

// Everything that the files of forms share is always inlined: a function that two files have is kept
// once, compiled with the instructions of either.
#define GROKCTL_INLINE static inline __attribute__((always_inline))
#define GROKCTL_MEMBER inline __attribute__((always_inline))

namespace grokctl {

// Columns that are multiplied together: a cache line of bytes.
constexpr int64_t kBlock = 64;
// Inputs of a scale group are padded with zeros to a whole number of these, so that every form can
// read on: whatever lies in a packed block behind the last input is multiplied by a zero.
constexpr int64_t kPad = 64;
// A scale group is summed in runs: int32 holds the sum of so many products of two bytes, ...
constexpr int64_t kLongestRun = 32768;
// ... and threads can share out a matrix of few groups by rows, too. Shorter runs gain nothing.
constexpr int64_t kShortestRun = 1024;
// Segments are whole runs; a matrix has at most so many. Their sums are added in this order by any
// number of threads, and for any number of tokens: an output never depends on either.
constexpr int64_t kMostSegments = 16;

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
  int8_t* bytes;        // (tokens, parts, runs, padded inputs of a run)
  int64_t row_bytes;    // of one part of one token
  int32_t* sums;        // (tokens, parts, runs)
  float* factors;       // (tokens)
  uint8_t* are_floats;  // (tokens) which cannot be integers: not finite, or too small

  // Where sums go whose segment alone was multiplied; null: to y.
  float* partial;  // (segments, tokens, outputs)

  GROKCTL_MEMBER int64_t group_inputs() const { return inputs / groups; }
  // Inputs of a run; the last of a group may have fewer.
  GROKCTL_MEMBER int64_t run_inputs() const {
    const int64_t wanted = groups < kMostSegments ? kMostSegments / groups : 1;
    const int64_t shared = (group_inputs() + wanted - 1) / wanted;
    const int64_t run = shared > kShortestRun ? shared : kShortestRun;
    const int64_t least = run < group_inputs() ? (run + kPad - 1) / kPad * kPad : group_inputs();
    return least < kLongestRun ? least : kLongestRun;
  }
  GROKCTL_MEMBER int64_t runs_of_group() const { return (group_inputs() + run_inputs() - 1) / run_inputs(); }
  GROKCTL_MEMBER int64_t runs() const { return groups * runs_of_group(); }
  GROKCTL_MEMBER int64_t run_padded() const { return (run_inputs() + kPad - 1) / kPad * kPad; }
  GROKCTL_MEMBER int64_t segments() const { return runs() < kMostSegments ? runs() : kMostSegments; }
  GROKCTL_MEMBER int64_t first_run(int64_t segment) const { return runs() * segment / segments(); }
  GROKCTL_MEMBER int64_t blocks() const { return (outputs + kBlock - 1) / kBlock; }
  GROKCTL_MEMBER bool is_integer() const { return stored == Stored::kInt8 || stored == Stored::kInt4; }
};

// A product with the transpose of a matrix: y = x @ weight^T.
struct Back {
  const uint8_t* weight;  // (rows, inputs)
  bool is_wide;           // float32, or the bits of bfloat16
  int64_t rows;
  int64_t inputs;
  const float* x;  // (tokens, inputs)
  int64_t tokens;
  float* y;  // (tokens, rows)
};

// Columns of some blocks, and the inputs of some segments: from the first to before the last.
struct Part {
  int64_t first_block, last_block;
  int64_t first_segment, last_segment;
};

// Memory of one thread.
struct Scratch {
  uint8_t* packed;
  uint8_t* sums;   // of a run
  float* totals;  // of a segment
};
constexpr int64_t kPackedBytes = 256 * 1024;
constexpr int64_t kSumsBytes = 512 * 1024;
constexpr int64_t kScratchBytes = kPackedBytes + 2 * kSumsBytes;

constexpr int64_t kAnyRows = INT64_MAX;

// The product in one instruction set. All give the same integers.
struct Form {
  const char* name;
  bool (*runs_here)();
  int activation_bytes;  // of one number of `bytes`
  int64_t most_rows;     // tokens times parts, up to which integers are not slower than floats
  // Converts activations of tokens [first, last).
  void (*prepare)(const Product& product, int64_t first, int64_t last);
  // Multiplies for a part of the matrix.
  void (*multiply)(const Product& product, const Scratch& scratch, const Part& part);
  // gelu(gate) * up, written over `gate`.
  void (*activate)(float* gate, const float* up, int64_t count);
  // For rows [first, last).
  void (*multiply_back)(const Back& back, int64_t first, int64_t last);
};

}  // namespace grokctl

#endif  // GROKCTL_KERNEL_H_
