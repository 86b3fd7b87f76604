// moe_info on the CPU: the token -> adapter map that MoE layers index, from segments.

#include <algorithm>

#include "cpu/kernels.h"

namespace lora_ext::cpu {

void moe_info(const MoeInfoParams& p) {
  // Everything that no segment covers, the padding tail above all, has no adapter.
  std::fill_n(p.token_slots, p.num_tokens, -1);
  std::fill_n(p.enabled, p.num_slots, 0);
  for (int64_t segment = 0; segment < p.num_segments; ++segment) {
    const int32_t slot = p.seg_slots[segment];
    if (slot < 0 || slot >= p.num_slots || p.ranks[slot] == 0) continue;
    const int64_t begin = std::clamp<int64_t>(p.seg_indptr[segment], 0, p.num_tokens);
    const int64_t end = std::clamp<int64_t>(p.seg_indptr[segment + 1], 0, p.num_tokens);
    if (begin >= end) continue;
    std::fill(p.token_slots + begin, p.token_slots + end, slot);
    p.enabled[slot] = 1;
  }
}

}  // namespace lora_ext::cpu
