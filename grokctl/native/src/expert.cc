#include "expert.h"

#include <algorithm>

#include "forms.h"
#include "pool.h"
#include "project.h"

namespace grokctl {
namespace {

// Numbers of one share: more than a fork costs.
constexpr int64_t kShare = 1 << 13;

struct Task {
  float* gate;
  const float* up;
  int64_t count;
  const Form* form;
};

void activate(const void* context, const Scratch&, int64_t first, int64_t last) {
  const Task& task = *static_cast<const Task*>(context);
  const int64_t start = first * kShare, end = std::min(last * kShare, task.count);
  task.form->activate(task.gate + start, task.up + start, end - start);
}

}  // namespace

bool expert(const Product& gate, const Product& up, const Product& down) {
  if (!project(gate) || !project(up)) return false;
  {
    Turn turn;
    if (!turn.is_ready()) return false;
    const Task task{gate.y, up.y, gate.tokens * gate.outputs, &chosen_form()};
    const int64_t shares = (task.count + kShare - 1) / kShare;
    if (shares < 4) {
      turn.alone(shares, activate, &task);
    } else {
      turn.share(shares, 1, activate, &task);
    }
  }
  return project(down);
}

}  // namespace grokctl
