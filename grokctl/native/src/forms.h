// The forms of all instruction sets, and the choice of one.
#ifndef GROKCTL_FORMS_H_
#define GROKCTL_FORMS_H_

#include "kernel.h"

namespace grokctl {

// Which of these are compiled is up to the architecture and the compiler: the others are null.
#define GROKCTL_FORM extern __attribute__((weak)) const Form
extern const Form portable;
GROKCTL_FORM avx2;
GROKCTL_FORM avxvnni;
GROKCTL_FORM avx512;
GROKCTL_FORM avx512vnni;
GROKCTL_FORM amx;
GROKCTL_FORM neon_dotprod;
GROKCTL_FORM neon_i8mm;
#undef GROKCTL_FORM

// The fastest form that runs here, or the one that was forced.
const Form& chosen_form();

// Whether a form of this name runs here; from now on it is the chosen one. Null: the fastest.
bool force_form(const char* name);

}  // namespace grokctl

#endif  // GROKCTL_FORMS_H_
