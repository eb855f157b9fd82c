// What Python asks by ctypes.
#include <cstdint>

#include "forms.h"
#include "pool.h"

#pragma GCC visibility push(default)
extern "C" {

const char* grokctl_isa() { return grokctl::chosen_form().name; }

int grokctl_force_isa(const char* name) { return grokctl::force_form(name) ? 1 : 0; }

void grokctl_set_threads(int threads) { grokctl::set_threads(threads); }

int grokctl_threads() { return grokctl::threads(); }

// Products, and forks, since the library was loaded.
void grokctl_stats(int64_t counts[2]) {
  const grokctl::Counts now = grokctl::counts();
  counts[0] = now.products;
  counts[1] = now.forks;
}

}
#pragma GCC visibility pop
