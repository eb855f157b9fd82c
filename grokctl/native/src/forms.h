// The forms of all instruction sets, and the choice of one.
#ifndef GROKCTL_FORMS_H_
#define GROKCTL_FORMS_H_

#include "kernel.h"

namespace grokctl {

extern const Form portable;

// The fastest form that runs here, or the one that was forced.
const Form& chosen_form();

// Whether a form of this name runs here; from now on it is the chosen one. Null: the fastest.
bool force_form(const char* name);

}  // namespace grokctl

#endif  // GROKCTL_FORMS_H_
