// moe_lora_align: the routed pairs of one MoE layer, grouped by (slot, expert) for its LoRA
// kernels.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <limits>

#include "ops/dispatch.h"

namespace lora_ext {
namespace {

using torch::headeronly::ScalarType;

MoeAlignParams align_params(const Tensor& topk_ids, const Tensor& token_slots, int64_t num_slots,
                            int64_t num_experts, const OptionalTensor& expert_map) {
  const bool wide = topk_ids.scalar_type() == ScalarType::Long;
  check(topk_ids.dim() == 2 && topk_ids.is_contiguous() &&
            (wide || topk_ids.scalar_type() == ScalarType::Int),
        "topk_ids must be a contiguous int32 or int64 tensor [tokens, top_k], got ",
        describe(topk_ids));
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check(num_slots >= 0 && num_experts >= 0 && num_slots <= kMost &&
            num_experts <= kMost / std::max<int64_t>(num_slots, 1),
        "num_slots and num_experts are ", num_slots, " and ", num_experts,
        ", expected neither below 0 and a product below 2^31");
  MoeAlignParams params{};
  params.topk_ids = topk_ids.const_data_ptr();
  params.ids_are_int64 = wide;
  params.num_pairs = topk_ids.numel();
  check(params.num_pairs <= kMost / 16, "topk_ids has ", params.num_pairs,
        " entries, more than 2^31 / 16");
  params.top_k = static_cast<int32_t>(topk_ids.size(1));
  params.token_slots = int32_vector("token_slots", token_slots, topk_ids);
  check(token_slots.numel() >= topk_ids.size(0), "token_slots has ", token_slots.numel(),
        " entries, topk_ids has ", topk_ids.size(0), " tokens");
  params.num_slots = static_cast<int32_t>(num_slots);
  params.num_experts = static_cast<int32_t>(num_experts);
  if (expert_map.has_value()) {
    params.expert_map = int32_vector("expert_map", *expert_map, topk_ids);
    params.num_global = static_cast<int32_t>(expert_map->numel());
  }
  return params;
}

// The CPU can look at the routing; on a GPU that would be a synchronisation, so what is out of
// range counts as not routed there. Tokens without an adapter may be padding: their ids say
// nothing.
void check_on_host(const MoeAlignParams& p) {
  const int64_t num_ids = p.expert_map != nullptr ? p.num_global : p.num_experts;
  for (int64_t pair = 0; pair < p.num_pairs; ++pair) {
    const int64_t token = pair / p.top_k;
    const int32_t slot = p.token_slots[token];
    check(slot >= -1 && slot < p.num_slots, "token_slots[", token, "] is ", slot,
          ", expected -1 to ", p.num_slots - 1);
    if (slot < 0) continue;
    const int64_t id = p.ids_are_int64 ? static_cast<const int64_t*>(p.topk_ids)[pair]
                                       : static_cast<const int32_t*>(p.topk_ids)[pair];
    check(id >= -1 && id < num_ids, "topk_ids[", token, ", ", pair % p.top_k, "] is ", id,
          ", expected -1 to ", num_ids - 1);
    check(id < 0 || p.expert_map == nullptr ||
              (p.expert_map[id] >= -1 && p.expert_map[id] < p.num_experts),
          "expert_map[", id, "] is ", p.expert_map != nullptr && id >= 0 ? p.expert_map[id] : 0,
          ", expected -1 to ", p.num_experts - 1);
  }
}

void align(const Tensor& routing, MoeAlignParams& params) {
  int32_vector("routing", routing, routing);
  const RoutingLayout at(params.num_pairs, int64_t{params.num_slots} * params.num_experts);
  check(routing.numel() >= at.size, "routing has ", routing.numel(),
        " elements, expected at least ", at.size, " for ", params.num_pairs, " pairs, ",
        params.num_slots, " slots and ", params.num_experts, " experts");
  params.routing = static_cast<int32_t*>(routing.mutable_data_ptr());
  check(reinterpret_cast<uintptr_t>(params.routing) % alignof(MoeTile) == 0,
        "routing must start at a multiple of 16 bytes");
  if (routing.is_cpu()) {
    check_on_host(params);
  }
  launch("moe_lora_align_", routing, params, LORA_EXT_KERNEL(moe_align));
}

void moe_lora_align_(const Tensor routing, const Tensor topk_ids, const Tensor token_slots,
                     int64_t num_slots, int64_t num_experts, const OptionalTensor expert_map) {
  MoeAlignParams params = align_params(topk_ids, token_slots, num_slots, num_experts, expert_map);
  int32_vector("routing", routing, topk_ids);
  align(routing, params);
}

Tensor moe_lora_align(const Tensor topk_ids, const Tensor token_slots, int64_t num_slots,
                      int64_t num_experts, const OptionalTensor expert_map) {
  MoeAlignParams params = align_params(topk_ids, token_slots, num_slots, num_experts, expert_map);
  const RoutingLayout at(params.num_pairs, num_slots * num_experts);
  Tensor routing =
      torch::stable::new_empty(token_slots, std::vector<int64_t>{at.size}, ScalarType::Int);
  align(routing, params);
  return routing;
}

}  // namespace

LORA_EXT_IMPL(moe_lora_align_, moe_lora_align_)
LORA_EXT_IMPL(moe_lora_align, moe_lora_align)

}  // namespace lora_ext
