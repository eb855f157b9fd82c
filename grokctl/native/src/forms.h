// The forms of all instruction sets, and the choice of one.
#ifndef GROKCTL_FORMS_H_
#define GROKCTL_FORMS_H_

#include "kernel.h"

namespace grokctl {

// Which of these are compiled is up to the architecture.
extern const Form portable;
extern const Form avx2;
extern const Form avxvnni;
extern const Form avx512;
extern const Form avx512vnni;
extern const Form amx;
extern const Form neon_dotprod;
extern const Form neon_i8mm;

// The fastest form that runs here, or the one that was forced.
const Form& chosen_form();

// Whether a form of this name runs here; from now on it is the chosen one. Null: the fastest.
bool force_form(const char* name);

}  // namespace grokctl

#endif  // GROKCTL_FORMS_H_
