// Apply on the CPU: shrink into the workspace, then expand. Both are independent of the rest of the
// batch as they are, so batch_invariant needs nothing further.

#include "cpu/kernels.h"

namespace lora_ext::cpu {

int64_t apply_workspace(const ApplyParams& p) { return p.num_tokens * p.slices.count * p.max_rank; }

void apply(const ApplyParams& p) {
  const int64_t xa_stride = int64_t{p.slices.count} * p.max_rank;
  // Only what expand reads is written: rows without an adapter and columns past the rank stay as
  // they are.
  shrink_adapters(ShrinkParams{p.x, p.x_stride, p.dtype, p.a, p.ranks, p.scalings, p.plan,
                               p.num_tokens, p.in_features, p.slices.count, p.max_rank, p.workspace,
                               xa_stride, p.stream});
  expand(ExpandParams{p.workspace, xa_stride, p.y, p.y_stride, p.dtype, p.y_dtype, p.b, p.ranks,
                      p.plan, p.num_tokens, p.slices, p.max_rank, p.stream});
}

}  // namespace lora_ext::cpu
