// What the instructions of each form can do when they wait for nothing: multiplications and
// additions of bytes a second, of one thread.
#include <chrono>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kRounds = 200000;

template <class Loop>
double rate(double operations, Loop loop) {
  const auto begin = std::chrono::steady_clock::now();
  for (int round = 0; round < kRounds; ++round) loop();
  const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
  return operations * kRounds / spent.count();
}

}  // namespace

#define TWELVE(one) \
  one("0") one("1") one("2") one("3") one("4") one("5") one("6") one("7") one("8") one("9") \
      one("10") one("11")

#if defined(__x86_64__)
#define VNNI512(n) "vpdpbusd %%zmm12, %%zmm13, %%zmm" n "\n"
#define VNNI256(n) "%{vex%} vpdpbusd %%ymm12, %%ymm13, %%ymm" n "\n"
#define MADD512(n) "vpmaddwd %%zmm12, %%zmm13, %%zmm" n "\n"
#define MADD256(n) "vpmaddwd %%ymm12, %%ymm13, %%ymm" n "\n"

#define CLOBBERS                                                                              \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
      "xmm11"

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
};

// 0: the form is not known here.
extern "C" __attribute__((visibility("default"))) double limit(const char* form) {
  if (strcmp(form, "amx") == 0) {
    const Config config;
    asm volatile("ldtilecfg %0" : : "m"(config));
    const double found = rate(4.0 * 2 * 16 * 16 * 64, [] {
      asm volatile(
          "tdpbsud %tmm5, %tmm4, %tmm0\ntdpbsud %tmm5, %tmm4, %tmm1\n"
          "tdpbsud %tmm5, %tmm4, %tmm2\ntdpbsud %tmm5, %tmm4, %tmm3");
    });
    asm volatile("tilerelease");
    return found;
  }
  if (strcmp(form, "avx512vnni") == 0)
    return rate(12.0 * 2 * 64, [] { asm volatile(TWELVE(VNNI512) : : : CLOBBERS); });
  if (strcmp(form, "avxvnni") == 0)
    return rate(12.0 * 2 * 32, [] { asm volatile(TWELVE(VNNI256) : : : CLOBBERS); });
  if (strcmp(form, "avx512") == 0)
    return rate(12.0 * 2 * 32, [] { asm volatile(TWELVE(MADD512) : : : CLOBBERS); });
  if (strcmp(form, "avx2") == 0)
    return rate(12.0 * 2 * 16, [] { asm volatile(TWELVE(MADD256) : : : CLOBBERS); });
  return 0;
}
#elif defined(__aarch64__)
#define SDOT(n) ".arch armv8.2-a+dotprod\nsdot v" n ".4s, v30.16b, v31.16b\n"
#define CLOBBERS "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11"
#define SMMLA(n) ".arch armv8.2-a+i8mm\nsmmla v" n ".4s, v30.16b, v31.16b\n"

extern "C" __attribute__((visibility("default"))) double limit(const char* form) {
  if (strcmp(form, "neon_dotprod") == 0)
    return rate(12.0 * 2 * 16, [] { asm volatile(TWELVE(SDOT) : : : CLOBBERS); });
  if (strcmp(form, "neon_i8mm") == 0)
    return rate(12.0 * 2 * 32, [] { asm volatile(TWELVE(SMMLA) : : : CLOBBERS); });
  return 0;
}
#endif
