// Multiplies random matrices in every form that runs here, and compares with sums of doubles.
// Prints the forms; exits with 0 if all are right.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <tuple>
#include <vector>

#include "forms.h"
#include "pool.h"
#include "project.h"

namespace {

using grokctl::Product;
using grokctl::Stored;

const char* const kNames[] = {"amx",          "avx512vnni", "avx512", "avxvnni", "avx2", "neon_i8mm",
                              "neon_dotprod", "portable"};

float widened(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

// Bytes in front of a page that nobody may read.
class Guarded {
 public:
  explicit Guarded(int64_t nbytes) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    size_ = (nbytes + page - 1) / page * page + page;
    void* mapped = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) abort();
    begin_ = static_cast<uint8_t*>(mapped);
    data = begin_ + size_ - page - nbytes;
    if (mprotect(begin_ + size_ - page, page, PROT_NONE) != 0) abort();
  }
  ~Guarded() { munmap(begin_, size_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  uint8_t* data;

 private:
  uint8_t* begin_;
  int64_t size_;
};

struct Case {
  Stored stored;
  int64_t inputs, outputs, groups, tokens;
  int parts;
};

// What is wrong with a form, or nothing.
const char* failure(const Case& given, std::mt19937& random) {
  const int64_t codes = given.stored == Stored::kInt4 ? 2 : 1;
  const int64_t size = given.stored == Stored::kFloat32 ? 4 : given.stored == Stored::kBfloat16 ? 2 : 1;
  std::normal_distribution<float> normal;
  const int64_t count = given.inputs / codes * given.outputs;
  const Guarded guarded(count * size);
  uint8_t* weight = guarded.data;
  std::vector<uint16_t> scales(given.groups * given.outputs);
  std::vector<float> x(given.tokens * given.inputs), y(given.tokens * given.outputs);
  for (int64_t index = 0; index < count; ++index) {
    if (size == 1) {
      weight[index] = static_cast<uint8_t>(random());
    } else {
      const float value = normal(random);
      memcpy(&weight[index * size], reinterpret_cast<const uint8_t*>(&value) + (4 - size), size);
    }
  }
  for (uint16_t& scale : scales) scale = static_cast<uint16_t>(0x3f00 + random() % 256);
  for (float& value : x) value = normal(random);
  Product product{};
  product.stored = given.stored;
  product.weight = weight;
  product.scales = size == 1 ? scales.data() : nullptr;
  product.inputs = given.inputs;
  product.outputs = given.outputs;
  product.groups = size == 1 ? given.groups : 1;
  product.x = x.data();
  product.tokens = given.tokens;
  product.parts = given.parts;
  product.y = y.data();
  if (!grokctl::project(product)) return "no memory";
  for (int64_t token = 0; token < given.tokens; ++token) {
    for (int64_t column = 0; column < given.outputs; ++column) {
      double sum = 0, sizes = 0;
      for (int64_t input = 0; input < given.inputs; ++input) {
        const int64_t place = input / codes * given.outputs + column;
        double code = 0;
        if (given.stored == Stored::kInt8) code = static_cast<int8_t>(weight[place]);
        if (given.stored == Stored::kInt4)
          code = (weight[place] >> (input % 2 * 4) & 15) - 8;
        if (size == 4) {
          float value;
          memcpy(&value, &weight[place * 4], sizeof value);
          code = value;
        }
        if (size == 2) {
          uint16_t bits;
          memcpy(&bits, &weight[place * 2], sizeof bits);
          code = widened(bits);
        }
        if (size == 1)
          code *= widened(scales[input / (given.inputs / given.groups) * given.outputs + column]);
        sum += code * x[token * given.inputs + input];
        sizes += code * code;
      }
      const double bound = (given.parts == 3 ? 1e-6 : 1e-4) * std::sqrt(sizes) * 4;
      if (!(std::abs(sum - y[token * given.outputs + column]) <= bound)) return "another product";
    }
  }
  return nullptr;
}

}  // namespace

int main() {
  int wrong = 0;
  for (const char* name : kNames) {
    if (!grokctl::force_form(name)) continue;
    std::mt19937 random(1);
    int cases = 0;
    for (int threads : {1, 3}) {
      grokctl::set_threads(threads);
      for (Stored stored : {Stored::kInt8, Stored::kInt4, Stored::kBfloat16, Stored::kFloat32}) {
        for (int64_t tokens : {1, 3, 9, 20}) {
          for (auto [inputs, outputs, groups] :
               {std::tuple<int64_t, int64_t, int64_t>{40, 7, 2}, {86, 65, 1}, {1200, 130, 20},
                {1700, 64, 1}, {90, 4200, 1}}) {
            const Case given{stored, inputs, outputs, groups, tokens, 2 + cases % 2};
            const char* problem = failure(given, random);
            ++cases;
            if (problem == nullptr) continue;
            printf("%s: %s (stored %d, %d x %d, %d groups, %d tokens, %d parts)\n", name, problem,
                   static_cast<int>(stored), static_cast<int>(inputs), static_cast<int>(outputs),
                   static_cast<int>(groups), static_cast<int>(tokens), given.parts);
            ++wrong;
          }
        }
      }
    }
    printf("%s: %d cases\n", name, cases);
  }
  return wrong == 0 ? 0 : 1;
}
