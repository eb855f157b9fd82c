// A product, shared out over the pool.
#ifndef GROKCTL_PROJECT_H_
#define GROKCTL_PROJECT_H_

#include "kernel.h"

namespace grokctl {

// Multiplies; of the product, the part before `bytes` is given. False: there is no memory.
bool project(Product product);

}  // namespace grokctl

#endif  // GROKCTL_PROJECT_H_
