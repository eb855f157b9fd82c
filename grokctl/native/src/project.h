// A product, shared out over the pool.
#ifndef GROKCTL_PROJECT_H_
#define GROKCTL_PROJECT_H_

#include "kernel.h"

namespace grokctl {

// Multiplies; of the product, the fields from `bytes` on are null. False: there is no memory.
bool project(const Product& product);

// Multiplies with a transpose. False: there is no memory.
bool project_back(const Back& back);

}  // namespace grokctl

#endif  // GROKCTL_PROJECT_H_
