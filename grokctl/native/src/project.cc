#include "project.h"

#include <algorithm>
#include <atomic>
#include <new>

#include "forms.h"
#include "pool.h"

namespace grokctl {
namespace {

// Multiplications of a code that take less time than a fork.
constexpr int64_t kLittle = 1 << 17;
// Activations that take longer to convert than a fork.
constexpr int64_t kManyActivations = 1 << 17;
// Shares of each thread, so that others can help it.
constexpr int64_t kHelpings = 4;
// Blocks that are read together: of a narrower panel, every page gives only a little, and of a
// wider one, the sums leave the cache.
constexpr int64_t kNarrowest = 16, kWidest = 64;
// Numbers that are worth to be written and read again, so that threads can share out rows.
constexpr int64_t kMostPartial = 1 << 22;

// How threads share out a matrix: in panels of columns, and these perhaps in segments of rows.
struct Task {
  Product product;
  const Form* form;
  int64_t panels;
  int64_t segments;           // that are multiplied apart
  std::atomic<int>* arrived;  // at the end of each panel

  int64_t first_block(int64_t panel) const { return product.blocks() * panel / panels; }
};

void prepare(const void* context, const Scratch&, int64_t first, int64_t last) {
  const Task& task = *static_cast<const Task*>(context);
  task.form->prepare(task.product, first, last);
}

void add_segments(const Product& product, int64_t first_column, int64_t last_column) {
  const int64_t segments = product.segments(), stride = product.tokens * product.outputs;
  for (int64_t token = 0; token < product.tokens; ++token) {
    float* y = product.y + token * product.outputs;
    const float* partial = product.partial + token * product.outputs;
    const float factor = product.factors == nullptr ? 1.0f : product.factors[token];
    for (int64_t segment = 0; segment < segments; ++segment, partial += stride) {
      for (int64_t column = first_column; column < last_column; ++column)
        y[column] = segment == 0 ? partial[column] : y[column] + partial[column];
    }
    for (int64_t column = first_column; column < last_column; ++column) y[column] *= factor;
  }
}

void multiply(const void* context, const Scratch& scratch, int64_t first, int64_t last) {
  const Task& task = *static_cast<const Task*>(context);
  const Product& product = task.product;
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t panel = unit % task.panels, segment = unit / task.panels;
    const int64_t first_block = task.first_block(panel), last_block = task.first_block(panel + 1);
    if (task.segments == 1) {
      task.form->multiply(product, scratch, {first_block, last_block, 0, product.segments()});
      continue;
    }
    task.form->multiply(product, scratch, {first_block, last_block, segment, segment + 1});
    // the last to arrive has the sums of all others before its eyes
    if (task.arrived[panel].fetch_add(1, std::memory_order_acq_rel) + 1 == task.segments)
      add_segments(product, first_block * kBlock, std::min(last_block * kBlock, product.outputs));
  }
}

struct BackTask {
  Back back;
  const Form* form;
};

// Rows of the embedding that a thread takes at a time: a quarter of a megabyte of Grok-1's.
constexpr int64_t kRowsAtATime = 16;

void multiply_back(const void* context, const Scratch&, int64_t first, int64_t last) {
  const BackTask& task = *static_cast<const BackTask*>(context);
  task.form->multiply_back(task.back, first * kRowsAtATime,
                           std::min(last * kRowsAtATime, task.back.rows));
}

int64_t aligned(int64_t nbytes) { return (nbytes + 63) / 64 * 64; }

void share_out(Task& task, int threads) {
  const int64_t blocks = task.product.blocks(), wanted = threads * kHelpings;
  task.segments = 1;
  task.panels = std::min(blocks, wanted);
  const int64_t partial = task.product.segments() * task.product.tokens * task.product.outputs;
  if (blocks >= wanted * kNarrowest || task.product.segments() == 1 || partial > kMostPartial) {
    // bands of whole pages, where there are columns enough
    task.panels = std::max(task.panels, (blocks + kWidest - 1) / kWidest);
    return;
  }
  task.segments = task.product.segments();
  task.panels = std::max((blocks + kWidest - 1) / kWidest,
                         std::min(blocks, (wanted + task.segments - 1) / task.segments));
}

bool multiplies_integers(const Task& task) {
  const Product& product = task.product;
  return product.is_integer() && product.tokens * product.parts <= task.form->most_rows;
}

// Memory for activations as integers, for sums of segments, and for the arrivals.
bool make_room(Turn& turn, Task& task) {
  Product& product = task.product;
  const bool is_integer = multiplies_integers(task);
  const int64_t rows = is_integer ? product.tokens * product.parts : 0;
  // and a cache line more: rows a power of two apart would share the same few lines of a cache
  product.row_bytes = product.runs() * product.run_padded() * task.form->activation_bytes + 64;
  // a tile of 16 rows and more may be read beyond the last
  const int64_t bytes = is_integer ? aligned((rows + 31) * product.row_bytes) : 0;
  const int64_t sums = aligned(rows * product.runs() * 4);
  const int64_t factors = aligned(product.tokens * 4), flags = aligned(product.tokens);
  const int64_t partial =
      task.segments == 1 ? 0 : aligned(task.segments * product.tokens * product.outputs * 4);
  const int64_t arrived = aligned(task.panels * sizeof *task.arrived);
  uint8_t* memory = turn.memory(bytes + sums + factors + flags + partial + arrived);
  if (memory == nullptr) return false;
  if (is_integer) {
    product.bytes = reinterpret_cast<int8_t*>(memory);
    product.sums = reinterpret_cast<int32_t*>(memory + bytes);
    product.factors = reinterpret_cast<float*>(memory + bytes + sums);
    product.are_floats = memory + bytes + sums + factors;
  }
  memory += bytes + sums + factors + flags;
  if (task.segments > 1) product.partial = reinterpret_cast<float*>(memory);
  task.arrived = new (memory + partial) std::atomic<int>[task.panels]();
  return true;
}

}  // namespace

bool project(const Product& product) {
  if (product.tokens == 0 || product.outputs == 0) return true;
  if (product.inputs == 0) {
    std::fill(product.y, product.y + product.tokens * product.outputs, 0.0f);
    return true;
  }
  Turn turn;
  if (!turn.is_ready()) return false;
  Task task{product, &chosen_form(), 1, 1, nullptr};
  const bool is_little =
      turn.threads() == 1 || product.inputs * product.outputs * product.tokens < kLittle;
  if (!is_little) share_out(task, turn.threads());
  if (!make_room(turn, task)) return false;
  if (multiplies_integers(task)) {
    if (is_little || product.tokens == 1 || product.tokens * product.inputs < kManyActivations) {
      turn.alone(product.tokens, prepare, &task);
    } else {
      turn.share(product.tokens, 1, prepare, &task);
    }
  }
  if (is_little) {
    turn.alone(1, multiply, &task);
  } else {
    turn.share(task.panels * task.segments, 1, multiply, &task);
  }
  return true;
}

bool project_back(const Back& back) {
  if (back.tokens == 0 || back.rows == 0) return true;
  Turn turn;
  if (!turn.is_ready()) return false;
  const BackTask task{back, &chosen_form()};
  const int64_t units = (back.rows + kRowsAtATime - 1) / kRowsAtATime;
  if (turn.threads() == 1 || back.rows * back.inputs * back.tokens < kLittle) {
    turn.alone(units, multiply_back, &task);
  } else {
    turn.share(units, 1, multiply_back, &task);
  }
  return true;
}

}  // namespace grokctl
