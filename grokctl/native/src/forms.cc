#include "forms.h"

#include <atomic>
#include <cstring>

namespace grokctl {
namespace {

// The fastest first.
const Form* const kForms[] = {
#if defined(__x86_64__)
    &amx, &avx512vnni, &avx512, &avxvnni, &avx2,
#elif defined(__aarch64__)
    &neon_i8mm, &neon_dotprod,
#endif
    &portable,
};

std::atomic<const Form*> chosen{nullptr};

const Form* named(const char* name) {
  for (const Form* form : kForms) {
    if (form == nullptr) continue;
    if ((name == nullptr || strcmp(name, form->name) == 0) && form->runs_here()) return form;
  }
  return nullptr;
}

}  // namespace

const Form& chosen_form() {
  const Form* form = chosen.load(std::memory_order_acquire);
  if (form == nullptr) {
    form = named(nullptr);
    chosen.store(form, std::memory_order_release);
  }
  return *form;
}

bool force_form(const char* name) {
  const Form* form = named(name);
  if (form != nullptr) chosen.store(form, std::memory_order_release);
  return form != nullptr;
}

}  // namespace grokctl
