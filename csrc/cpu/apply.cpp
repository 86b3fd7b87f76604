// Apply on the CPU: shrink into the workspace, then expand. Both are independent of the rest of the
// batch as they are, so batch_invariant needs nothing further.

#include "cpu/kernels.h"

namespace lora_ext::cpu {

int64_t apply_workspace(const ApplyParams& p) { return p.num_tokens * p.slices.count * p.max_rank; }

void apply(const ApplyParams& p) {
  shrink_adapters(shrink_of(p));
  cpu::expand(expand_of(p));
}

}  // namespace lora_ext::cpu
