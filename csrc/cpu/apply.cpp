// Apply on the CPU: shrink into the workspace, then expand. Both are independent of the rest of the
// batch as they are, so batch_invariant needs nothing further.

#include "cpu/kernels.h"

namespace lora_ext::cpu {

int64_t apply_workspace(const ApplyParams& p) { return p.num_tokens * p.slices.count * p.max_rank; }

void apply(const ApplyParams& p) {
  ShrinkParams shrink{};
  shrink.x = p.x;
  shrink.x_stride = p.x_stride;
  shrink.dtype = p.dtype;
  shrink.a = p.a;
  shrink.ranks = p.ranks;
  shrink.scalings = p.scalings;
  shrink.plan = p.plan;
  shrink.num_tokens = p.num_tokens;
  shrink.in_features = p.in_features;
  shrink.num_slices = p.slices.count;
  shrink.max_rank = p.max_rank;
  shrink.xa = p.workspace;
  shrink.xa_stride = int64_t{p.slices.count} * p.max_rank;
  shrink_adapters(shrink);

  ExpandParams expand{};
  expand.xa = shrink.xa;
  expand.xa_stride = shrink.xa_stride;
  expand.y = p.y;
  expand.y_stride = p.y_stride;
  expand.dtype = p.dtype;
  expand.y_dtype = p.y_dtype;
  expand.b = p.b;
  expand.ranks = p.ranks;
  expand.plan = p.plan;
  expand.num_tokens = p.num_tokens;
  expand.slices = p.slices;
  expand.max_rank = p.max_rank;
  cpu::expand(expand);
}

}  // namespace lora_ext::cpu
