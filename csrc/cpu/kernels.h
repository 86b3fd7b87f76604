// The CPU kernels: the same parameter structs as the CUDA kernels, on host pointers.
//
// Every output element is summed by one thread in one fixed order, which depends on nothing but its
// own row: the bits are the same for any number of threads and for any other rows in the batch.
#pragma once

#include "common/params.h"

namespace lora_ext::cpu {

void plan_batch(const PlanParams& params);
void shrink(const ShrinkParams& params);
// shrink without the zeros where no adapter reaches: for a caller that reads only what is there.
void shrink_adapters(const ShrinkParams& params);
void expand(const ExpandParams& params);
void embedding(const EmbeddingParams& params);
void embedding_apply(const EmbeddingApplyParams& params);
void moe_info(const MoeInfoParams& params);
void moe_align(const MoeAlignParams& params);

// apply needs `apply_workspace(params)` elements (fp32, or fp64 where dtype is) in
// params.workspace.
int64_t apply_workspace(const ApplyParams& params);
void apply(const ApplyParams& params);
void apply_backward(const ApplyBackwardParams& params);
int64_t moe_apply_workspace(const MoeApplyParams& params);  // bytes
void moe_apply(const MoeApplyParams& params);

}  // namespace lora_ext::cpu
