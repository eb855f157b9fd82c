// What this processor can do, and the system allows.
#ifndef GROKCTL_PROCESSOR_H_
#define GROKCTL_PROCESSOR_H_

namespace grokctl {

struct Processor {
  bool avx2;        // with FMA
  bool avxvnni;
  bool avx512;      // F, BW, VL, DQ
  bool avx512vnni;
  bool amx_int8;
  bool dotprod;
  bool i8mm;
};

// Asked once.
const Processor& processor();

}  // namespace grokctl

#endif  // GROKCTL_PROCESSOR_H_
