// plan_batch_: from slots per token or per segment to the plan that every layer of the batch
// shares.
#include "kernels/heuristics.h"
#include "ops/dispatch.h"

namespace lora_ext {
namespace {

// The CPU can look at the batch; on a GPU that would be a synchronisation, so the kernel clamps
// instead: a slot out of range counts as -1, tokens past the capacity are dropped, nothing is
// written out of bounds.
void check_on_host(const PlanParams& params) {
  int64_t tokens = params.seg_lens == nullptr && params.seg_indptr == nullptr ? params.n : 0;
  for (int64_t i = 0; i < params.n; ++i) {
    check(params.slots[i] >= -1 && params.slots[i] < params.plan.num_slots, "slots[", i, "] is ",
          params.slots[i], ", expected -1 to ", params.plan.num_slots - 1);
    if (params.seg_lens != nullptr) {
      check(params.seg_lens[i] >= 0, "seg_lens[", i, "] is ", params.seg_lens[i]);
      tokens += params.seg_lens[i];
    } else if (params.seg_indptr != nullptr) {
      const int64_t length = int64_t{params.seg_indptr[i + 1]} - params.seg_indptr[i];
      check(length >= 0, "seg_indptr falls from ", params.seg_indptr[i], " to ",
            params.seg_indptr[i + 1], " at ", i);
      tokens += length;
    }
  }
  check(params.seg_indptr == nullptr || params.seg_indptr[0] == 0, "seg_indptr must start at 0");
  check(tokens <= params.plan.max_tokens, "the batch has ", tokens,
        " tokens, the plan has room for ", params.plan.max_tokens);
}

void plan_batch_(const Tensor plan, const Tensor slots, const OptionalTensor seg_lens,
                 const OptionalTensor seg_indptr, int64_t num_slots) {
  check(!seg_lens.has_value() || !seg_indptr.has_value(), "give seg_lens or seg_indptr, not both");
  check(num_slots >= 0 && num_slots <= kMaxSlots, "num_slots must be between 0 and ", kMaxSlots,
        ", got ", num_slots);
  PlanParams params{};
  params.slots = int32_vector("slots", slots, plan);
  params.n = slots.numel();
  if (seg_lens.has_value()) {
    params.seg_lens = int32_vector("seg_lens", *seg_lens, plan);
    check(seg_lens->numel() == params.n, "seg_lens has ", seg_lens->numel(), " entries, slots has ",
          params.n);
  }
  if (seg_indptr.has_value()) {
    params.seg_indptr = int32_vector("seg_indptr", *seg_indptr, plan);
    check(seg_indptr->numel() == params.n + 1, "seg_indptr has ", seg_indptr->numel(),
          " entries, expected ", params.n + 1, " for ", params.n, " slots");
  }
  int32_vector("plan", plan, plan);
  const int64_t max_tokens = plan_max_tokens(plan.numel(), num_slots);
  check(max_tokens >= 0, "plan has ", plan.numel(),
        " elements, which is no plan_size(max_tokens, num_slots) for ", num_slots, " slots");
  const bool per_segment = seg_lens.has_value() || seg_indptr.has_value();
  check(per_segment || params.n <= max_tokens, "slots has ", params.n,
        " tokens, the plan has room for ", max_tokens);
  params.plan = plan_view(static_cast<int32_t*>(plan.mutable_data_ptr()), max_tokens, num_slots);
  if (plan.is_cpu()) {
    check_on_host(params);
  }
  launch("plan_batch_", plan, params, LORA_EXT_KERNEL(plan_batch));
}

}  // namespace

LORA_EXT_IMPL(plan_batch_, plan_batch_)

}  // namespace lora_ext
