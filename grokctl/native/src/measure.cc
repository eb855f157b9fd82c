// How fast one token reads weights here: what `doctor` reckons with.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "kernel.h"
#include "pool.h"
#include "project.h"

namespace grokctl {
namespace {

// The gate of an expert: rows as long as those that decoding reads.
constexpr int64_t kInputs = 6144, kOutputs = 32768;
constexpr int64_t kHugePage = 2 * 1024 * 1024;

// Pages belong to the node of the thread that writes them first.
void fill(const void* context, const Scratch&, int64_t first, int64_t last) {
  memset(static_cast<uint8_t*>(const_cast<void*>(context)) + first * kHugePage, 1,
         (last - first) * kHugePage);
}

}  // namespace
}  // namespace grokctl

#pragma GCC visibility push(default)
// Bytes a second of int8 weights that products of one token read from memory; 0: there is too
// little. The fastest of some rounds over matrices of so many bytes counts.
extern "C" double grokctl_measure(int64_t nbytes, int rounds) {
  using namespace grokctl;
  const int64_t inputs = std::clamp<int64_t>(nbytes / kOutputs / 64 * 64, 64, kInputs);
  const int64_t matrix = inputs * kOutputs, matrices = std::max<int64_t>(1, nbytes / matrix);
  const int64_t size = matrices * matrix;
  void* mapped = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return 0;
  auto* weights = reinterpret_cast<uint8_t*>(
      (reinterpret_cast<uintptr_t>(mapped) + kHugePage - 1) / kHugePage * kHugePage);
#ifdef MADV_HUGEPAGE
  madvise(weights, size, MADV_HUGEPAGE);
#endif
  {
    Turn turn;
    turn.share(size / kHugePage, 1, fill, weights);
  }
  std::vector<float> x(inputs, 1.0f), y(kOutputs), scales(kOutputs, 1.0f);
  double best = 0;
  for (int round = 0; round < rounds; ++round) {
    const auto begun = std::chrono::steady_clock::now();
    for (int64_t index = 0; index < matrices; ++index) {
      Product product{};
      product.stored = Stored::kInt8;
      product.weight = weights + index * matrix;
      product.scales = scales.data();
      product.scales_are_wide = true;
      product.inputs = inputs;
      product.outputs = kOutputs;
      product.groups = 1;
      product.x = x.data();
      product.tokens = 1;
      product.parts = 2;
      product.y = y.data();
      if (!project(product)) {
        munmap(mapped, size + kHugePage);
        return 0;
      }
    }
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begun;
    best = std::max(best, static_cast<double>(size) / took.count());
  }
  munmap(mapped, size + kHugePage);
  return best;
}
#pragma GCC visibility pop
