// A whole expert: down(gelu(x @ gate) * (x @ up)).
#ifndef GROKCTL_EXPERT_H_
#define GROKCTL_EXPERT_H_

#include "kernel.h"

namespace grokctl {

// Three products as for `project`; the outputs of `gate` are written over, and are the activations
// of `down`. False: there is no memory.
bool expert(const Product& gate, const Product& up, const Product& down);

}  // namespace grokctl

#endif  // GROKCTL_EXPERT_H_
