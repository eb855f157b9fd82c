#include "processor.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif
#endif

namespace grokctl {
namespace {

#if defined(__x86_64__)

// Registers that the system saves: bits of XCR0.
constexpr uint64_t kAvxState = 0x6, kAvx512State = 0xe6, kTileState = 0x60000;

uint64_t saved_state() {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

// Linux gives a process the tiles of AMX only if it asks.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

Processor found() {
  Processor has{};
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return has;
  const bool saves = ecx >> 27 & 1, avx = ecx >> 28 & 1, fma = ecx >> 12 & 1;
  if (!saves || !avx || !fma) return has;
  const uint64_t state = saved_state();
  if ((state & kAvxState) != kAvxState || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx))
    return has;
  has.avx2 = ebx >> 5 & 1;
  const uint32_t needed = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  has.avx512 = has.avx2 && (state & kAvx512State) == kAvx512State && (ebx & needed) == needed;
  has.avx512vnni = has.avx512 && (ecx >> 11 & 1);
  const bool tiles = (edx >> 24 & 1) && (edx >> 25 & 1);  // AMX-TILE, AMX-INT8
  has.amx_int8 =
      has.avx512vnni && tiles && (state & kTileState) == kTileState && may_use_tiles();
  if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) has.avxvnni = has.avx2 && (eax >> 4 & 1);
  return has;
}

#elif defined(__aarch64__) && defined(__linux__)

Processor found() {
  Processor has{};
  has.dotprod = getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
  has.i8mm = has.dotprod && (getauxval(AT_HWCAP2) >> 13 & 1);  // HWCAP2_I8MM
  return has;
}

#elif defined(__aarch64__) && defined(__APPLE__)

Processor found() {
  Processor has{};
  has.dotprod = true;  // every processor of Apple's with this architecture that runs macOS
  return has;
}

#else

Processor found() { return {}; }

#endif

}  // namespace

const Processor& processor() {
  static const Processor has = found();
  return has;
}

}  // namespace grokctl
