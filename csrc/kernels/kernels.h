// The CUDA launchers, as the ops call them: no CUDA header needed. Each queues its kernels on
// params.stream and returns the cudaError_t of the launch as an int; none synchronises or
// allocates.
#pragma once

#include <cstdint>

#include "common/params.h"

namespace lora_ext::cuda {

int plan_batch(const PlanParams& params);
// The same with slots and seg_indptr in one buffer of pinned host memory, which the kernel reads.
int plan_batch_from_host(const PlanParams& params);
int shrink(const ShrinkParams& params);
int expand(const ExpandParams& params);
int apply(const ApplyParams& params);
// Whether its kernels can do with params.beside.
bool apply_runs_beside(const ApplyParams& params);
// Whether it is a shrink and an expand, through the workspace, whose results are its own bit for
// bit; and those, where it is. Another kernel may be between them in the stream.
bool apply_has_halves(const ApplyParams& params);
int apply_shrink(const ApplyParams& params);
int apply_expand(const ApplyParams& params);
int64_t apply_workspace(const ApplyParams& params);  // fp32 elements
// A base layer with its apply, where linear_decode_takes says that one stream of W serves both;
// the workspace is the apply's.
bool linear_decode_takes(const LinearParams& params);
int linear_decode(const LinearParams& params);
// The same for somewhat more tokens; asked first.
bool linear_wgmma_takes(const LinearParams& params);
int linear_wgmma(const LinearParams& params);
int apply_backward(const ApplyBackwardParams& params);
int embedding(const EmbeddingParams& params);
int embedding_apply(const EmbeddingApplyParams& params);
int moe_info(const MoeInfoParams& params);
int moe_align(const MoeAlignParams& params);
int moe_apply(const MoeApplyParams& params);
int64_t moe_apply_workspace(const MoeApplyParams& params);  // bytes

const char* error_string(int error);

}  // namespace lora_ext::cuda
