#include "project.h"

#include <algorithm>

#include "forms.h"
#include "pool.h"

namespace grokctl {
namespace {

// Multiplications of a code that take less time than a fork.
constexpr int64_t kLittle = 1 << 17;
// Activations that take longer to convert than a fork.
constexpr int64_t kManyActivations = 1 << 17;
// A thread takes its columns in so many parts, so that others can help it.
constexpr int64_t kHelpings = 4;
// Columns of one part: fewer would read only a little of each page.
constexpr int64_t kWidest = 4096 / kBlock;

struct Task {
  Product product;
  const Form* form;
};

void prepare(const void* context, const Scratch&, int64_t first, int64_t last) {
  const Task& task = *static_cast<const Task*>(context);
  task.form->prepare(task.product, first, last);
}

void multiply(const void* context, const Scratch& scratch, int64_t first, int64_t last) {
  const Task& task = *static_cast<const Task*>(context);
  task.form->multiply(task.product, scratch, first, last);
}

int64_t aligned(int64_t nbytes) { return (nbytes + 63) / 64 * 64; }

// Finds room for activations as integers.
bool make_room(Turn& turn, Product& product, int activation_bytes) {
  const int64_t rows = product.tokens * product.parts;
  product.row_bytes = product.groups * product.group_padded() * activation_bytes;
  // a tile of 16 rows may be read beyond the last
  const int64_t bytes = aligned((rows + 15) * product.row_bytes);
  const int64_t sums = aligned(rows * product.groups * 4), factors = aligned(product.tokens * 4);
  uint8_t* memory = turn.memory(bytes + sums + factors + aligned(product.tokens));
  if (memory == nullptr) return false;
  product.bytes = reinterpret_cast<int8_t*>(memory);
  product.sums = reinterpret_cast<int32_t*>(memory + bytes);
  product.factors = reinterpret_cast<float*>(memory + bytes + sums);
  product.are_floats = memory + bytes + sums + factors;
  return true;
}

}  // namespace

bool project(Product product) {
  if (product.tokens == 0 || product.outputs == 0) return true;
  if (product.inputs == 0) {
    std::fill(product.y, product.y + product.tokens * product.outputs, 0.0f);
    return true;
  }
  Task task{product, &chosen_form()};
  Turn turn;
  const bool is_little =
      turn.threads() == 1 || product.inputs * product.outputs * product.tokens < kLittle;
  task.product.bytes = nullptr;
  if (product.is_integer() && product.group_inputs() <= kLongestRun) {
    if (!make_room(turn, task.product, task.form->activation_bytes)) return false;
    if (is_little || product.tokens == 1 || product.tokens * product.inputs < kManyActivations) {
      turn.alone(product.tokens, prepare, &task);
    } else {
      turn.share(product.tokens, 1, prepare, &task);
    }
  }
  const int64_t blocks = product.blocks();
  if (is_little) {
    turn.alone(blocks, multiply, &task);
  } else {
    const int64_t own = blocks / turn.threads();
    const int64_t grain = std::clamp<int64_t>(own / kHelpings, 1, kWidest);
    turn.share(blocks, grain, multiply, &task);
  }
  return true;
}

}  // namespace grokctl
