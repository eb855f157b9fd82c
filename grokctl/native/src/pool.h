// The threads of this process that multiply: made once, pinned, and shared by all who call.
#ifndef GROKCTL_POOL_H_
#define GROKCTL_POOL_H_

#include <cstdint>
#include <mutex>

#include "kernel.h"

namespace grokctl {

// What the pool has done since it was made.
struct Counts {
  int64_t products;  // matrices that were multiplied
  int64_t forks;     // times that work was shared out, each with one join
};

using Work = void (*)(const void* context, const Scratch& scratch, int64_t first, int64_t last);

// All threads, for one caller at a time; others wait. The caller is one of the threads, so that no
// more threads than cores compute, however many devices call.
class Turn {
 public:
  Turn();
  ~Turn();
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

  // Calls work for all of [0, units), `grain` at a time: every thread its own range, and then what
  // is left of others'.
  void share(int64_t units, int64_t grain, Work work, const void* context);

  // The same in this thread alone: for work that takes less time than a fork.
  void alone(int64_t units, Work work, const void* context);

  // Memory for one turn, at the start of a cache line; null: there is no more.
  uint8_t* memory(int64_t nbytes);

  // Whether there is memory for the sums of this thread, which then does what others leave.
  bool is_ready();

  int threads() const;

 private:
  class Pool& pool_;
  std::unique_lock<std::mutex> lock_;
};

// From the next turn on; at least one. The default is the number of cores of this process.
void set_threads(int threads);
int threads();
Counts counts();

}  // namespace grokctl

#endif  // GROKCTL_POOL_H_
