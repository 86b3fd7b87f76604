// moe_lora_info: the token -> adapter map and the enabled flags that MoE layers share, in one
// launch.
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "ops/dispatch.h"

namespace lora_ext {
namespace {

void moe_lora_info_(const Tensor token_slots, const Tensor enabled, const Tensor seg_indptr,
                    const Tensor seg_slots, const Tensor ranks) {
  MoeInfoParams params{};
  params.seg_indptr = int32_vector("seg_indptr", seg_indptr, ranks);
  params.seg_slots = int32_vector("seg_slots", seg_slots, ranks);
  params.ranks = int32_vector("ranks", ranks, ranks);
  params.num_segments = seg_slots.numel();
  params.num_slots = ranks.numel();
  params.num_tokens = token_slots.numel();
  check(seg_indptr.numel() == params.num_segments + 1, "seg_indptr has ", seg_indptr.numel(),
        " entries, expected ", params.num_segments + 1, " for ", params.num_segments, " segments");
  int32_vector("token_slots", token_slots, ranks);
  int32_vector("enabled", enabled, ranks);
  check(enabled.numel() == params.num_slots, "enabled has ", enabled.numel(),
        " entries, ranks has ", params.num_slots);
  params.token_slots = static_cast<int32_t*>(token_slots.mutable_data_ptr());
  params.enabled = static_cast<int32_t*>(enabled.mutable_data_ptr());
  launch("moe_lora_info_", ranks, params, LORA_EXT_KERNEL(moe_info));
}

std::tuple<Tensor, Tensor> moe_lora_info(const Tensor seg_indptr, const Tensor seg_slots,
                                         const Tensor ranks, int64_t num_tokens) {
  check(num_tokens >= 0, "num_tokens is ", num_tokens);
  int32_vector("ranks", ranks, ranks);
  Tensor token_slots = torch::stable::new_empty(ranks, std::vector<int64_t>{num_tokens});
  Tensor enabled = torch::stable::new_empty(ranks, std::vector<int64_t>{ranks.numel()});
  moe_lora_info_(token_slots, enabled, seg_indptr, seg_slots, ranks);
  return {token_slots, enabled};
}

}  // namespace

LORA_EXT_IMPL(moe_lora_info_, moe_lora_info_)
LORA_EXT_IMPL(moe_lora_info, moe_lora_info)

}  // namespace lora_ext
