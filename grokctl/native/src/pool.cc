#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <vector>

namespace grokctl {
namespace {

// How long a thread looks for work before it sleeps: products follow each other closely.
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr int kPauses = 32;  // between two looks at the clock
constexpr int64_t kHugePage = 2 * 1024 * 1024;

// `state`: the number of a job, whether it is closed, and how many threads are inside. A thread
// that comes late finds the job closed, and nobody waits for it.
constexpr uint64_t kJob = uint64_t{1} << 32;
constexpr uint64_t kClosed = uint64_t{1} << 31;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Condition>
bool spin_until(Condition is_met) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int index = 0; index < kPauses; ++index) {
      if (is_met()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

struct Freed {
  void operator()(uint8_t* memory) const { free(memory); }
};
using Memory = std::unique_ptr<uint8_t, Freed>;

Memory allocated(int64_t nbytes) {
  const int64_t alignment = nbytes >= kHugePage ? kHugePage : 64;
  const int64_t size = (nbytes + alignment - 1) / alignment * alignment;
  return Memory(static_cast<uint8_t*>(aligned_alloc(alignment, size)));
}

// Tiny numbers become 0 meanwhile, as they do in XLA's programs: a processor may take a hundred
// times as long for them.
class TinyToZero {
 public:
#if defined(__x86_64__)
  TinyToZero() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(before_ | 0x8040); }
  ~TinyToZero() { __builtin_ia32_ldmxcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  TinyToZero() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | uint64_t{1} << 24));
  }
  ~TinyToZero() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#else
  TinyToZero() {}
#endif
};

std::vector<int> usable_cpus() {
  std::vector<int> cpus;
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
    }
  }
#endif
  return cpus;
}

int default_threads() {
  const size_t cpus = usable_cpus().size();
  const long online = sysconf(_SC_NPROCESSORS_ONLN);
  return cpus > 0 ? static_cast<int>(cpus) : online > 0 ? static_cast<int>(online) : 1;
}

std::atomic<int> wanted{0};
std::atomic<int64_t> products{0};
std::atomic<int64_t> forks{0};

// One thread's share of a job.
struct alignas(128) Share {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
  pthread_t thread{};
  Memory memory;

  bool allocate() {
    if (memory == nullptr) memory = allocated(kScratchBytes);
    return memory != nullptr;
  }
  Scratch scratch() const {
    uint8_t* sums = memory.get() + kPackedBytes;
    return {memory.get(), sums, reinterpret_cast<float*>(sums + kSumsBytes)};
  }
};

}  // namespace

class Pool {
 public:
  static Pool& get();

  // Starts threads, or ends the ones that are no longer wanted; with the turn held.
  void resize() {
    const int count = wanted.load() > 0 ? wanted.load() : default_threads();
    if (count == asked_) return;
    end_threads();
    asked_ = count;
    shares_ = std::vector<Share>(count);
    const std::vector<int> cpus = usable_cpus();
    // signals are for the threads of the interpreter
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    threads_ = 1;
    for (; threads_ < count; ++threads_) {
      auto* start = new Start{this, threads_};
      if (pthread_create(&shares_[threads_].thread, nullptr, run, start) != 0) {
        delete start;  // fewer threads are slower, and no error
        break;
      }
#if defined(__linux__)
      pthread_setname_np(shares_[threads_].thread, "grokctl-kernel");
      // with a quota, fewer threads than cores: then the system places them
      if (static_cast<int>(cpus.size()) == count) {
        cpu_set_t own;
        CPU_ZERO(&own);
        CPU_SET(cpus[threads_], &own);
        pthread_setaffinity_np(shares_[threads_].thread, sizeof own, &own);
      }
#endif
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void share(int64_t units, int64_t grain, Work work, const void* context) {
    work_ = work;
    context_ = context;
    grain_ = grain;
    for (int index = 0; index < threads_; ++index) {
      shares_[index].next.store(units * index / threads_, std::memory_order_relaxed);
      shares_[index].end = units * (index + 1) / threads_;
    }
    forks.fetch_add(1, std::memory_order_relaxed);
    const uint64_t job = (state_.load(std::memory_order_relaxed) & ~(kJob - 1)) + kJob;
    state_.store(job);
    if (asleep_.load() > 0) {
      { std::lock_guard<std::mutex> guard(sleep_); }
      wake_.notify_all();
    }
    work_through(0);
    uint64_t before = state_.fetch_or(kClosed);
    auto is_empty = [&] { return (state_.load(std::memory_order_acquire) & (kClosed - 1)) == 0; };
    if ((before & (kClosed - 1)) != 0 && !spin_until(is_empty)) {
      std::unique_lock<std::mutex> guard(sleep_);
      waits_.store(true);
      done_.wait(guard, is_empty);
      waits_.store(false);
    }
  }

  void alone(int64_t units, Work work, const void* context) {
    const TinyToZero tiny_to_zero;
    work(context, shares_[0].scratch(), 0, units);
  }

  bool is_ready() { return shares_[0].allocate(); }

  uint8_t* memory(int64_t nbytes) {
    if (nbytes > memory_bytes_) {
      memory_ = nullptr;
      memory_ = allocated(nbytes);
      memory_bytes_ = memory_ == nullptr ? 0 : nbytes;
    }
    return memory_.get();
  }

  int threads() const { return threads_; }

  std::mutex turn;

 private:
  struct Start {
    Pool* pool;
    int index;
  };

  static void* run(void* argument) {
    std::unique_ptr<Start> start(static_cast<Start*>(argument));
    start->pool->serve(start->index);
    return nullptr;
  }

  void serve(int index) {
    uint64_t seen = 0;
    for (;;) {
      auto is_new = [&] {
        return (state_.load(std::memory_order_acquire) & ~(kJob - 1)) != seen || ends_.load();
      };
      if (!spin_until(is_new)) {
        std::unique_lock<std::mutex> guard(sleep_);
        asleep_.fetch_add(1);
        wake_.wait(guard, is_new);
        asleep_.fetch_sub(1);
      }
      if (ends_.load()) return;
      uint64_t state = state_.load(std::memory_order_acquire);
      seen = state & ~(kJob - 1);
      while ((state & kClosed) == 0 && (state & ~(kJob - 1)) == seen) {
        if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire)) continue;
        work_through(index);
        if (((state_.fetch_sub(1) - 1) & (kClosed - 1)) == 0 && waits_.load()) {
          { std::lock_guard<std::mutex> guard(sleep_); }
          done_.notify_all();
        }
        break;
      }
    }
  }

  void work_through(int index) {
    Share& own = shares_[index];
    // without memory for its sums a thread leaves its share to others
    if (!own.allocate()) return;
    const TinyToZero tiny_to_zero;
    for (int turn = 0; turn < threads_; ++turn) {
      Share& share = shares_[(index + turn) % threads_];
      for (;;) {
        if (share.next.load(std::memory_order_relaxed) >= share.end) break;
        const int64_t first = share.next.fetch_add(grain_, std::memory_order_relaxed);
        if (first >= share.end) break;
        const int64_t last = first + grain_ < share.end ? first + grain_ : share.end;
        work_(context_, own.scratch(), first, last);
      }
    }
  }

  void end_threads() {
    ends_.store(true);
    { std::lock_guard<std::mutex> guard(sleep_); }
    wake_.notify_all();
    for (int index = 1; index < threads_; ++index) pthread_join(shares_[index].thread, nullptr);
    ends_.store(false);
    threads_ = 1;
  }

  std::vector<Share> shares_;
  int asked_ = 0;
  int threads_ = 1;
  Work work_ = nullptr;
  const void* context_ = nullptr;
  int64_t grain_ = 1;
  alignas(128) std::atomic<uint64_t> state_{kClosed};
  alignas(128) std::atomic<int> asleep_{0};
  std::atomic<bool> waits_{false};
  std::atomic<bool> ends_{false};
  std::mutex sleep_;
  std::condition_variable wake_, done_;
  Memory memory_;
  int64_t memory_bytes_ = 0;
};

namespace {
std::atomic<Pool*> instance{nullptr};
}  // namespace

// Never deleted: its threads may still look at it while the process ends. A child of fork() has
// none of them, and begins anew.
Pool& Pool::get() {
  Pool* pool = instance.load(std::memory_order_acquire);
  if (pool != nullptr) return *pool;
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { instance.store(nullptr); }); });
  auto* made = new Pool;
  if (instance.compare_exchange_strong(pool, made)) return *made;
  delete made;
  return *pool;
}

Turn::Turn() : pool_(Pool::get()), lock_(pool_.turn) {
  pool_.resize();
  products.fetch_add(1, std::memory_order_relaxed);
}
Turn::~Turn() = default;
void Turn::share(int64_t units, int64_t grain, Work work, const void* context) {
  pool_.share(units, grain, work, context);
}
void Turn::alone(int64_t units, Work work, const void* context) {
  pool_.alone(units, work, context);
}
uint8_t* Turn::memory(int64_t nbytes) { return pool_.memory(nbytes); }
bool Turn::is_ready() { return pool_.is_ready(); }
int Turn::threads() const { return pool_.threads(); }

void set_threads(int threads) { wanted.store(threads > 0 ? threads : 0); }
int threads() { return wanted.load() > 0 ? wanted.load() : default_threads(); }
Counts counts() { return {products.load(), forks.load()}; }

}  // namespace grokctl
