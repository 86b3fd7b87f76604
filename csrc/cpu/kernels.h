// The CPU kernels: the same parameters as the CUDA ones (the stream is ignored), the same results
// up to rounding.
#pragma once

#include <cstdint>

#include "common/params.h"

namespace lora_ext::cpu {

void plan_batch(const PlanParams& params);
void shrink(const ShrinkParams& params);
void expand(const ExpandParams& params);
void apply(const ApplyParams& params);
int64_t apply_workspace(const ApplyParams& params);  // elements of the accumulator's type
void embedding(const EmbeddingParams& params);
void moe_info(const MoeInfoParams& params);

}  // namespace lora_ext::cpu
