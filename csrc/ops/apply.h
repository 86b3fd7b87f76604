// What the ops that shrink and expand, and the gradient, have in common: from their arguments to
// the kernels' struct.
#pragma once

#include "ops/arguments.h"

namespace lora_ext {

// All but A, B, y and the workspace; x is [T, K].
ApplyParams apply_input(const Tensor& x, const Tensor& ranks, const Tensor& scalings,
                        const Tensor& plan, const std::vector<int64_t>& output_slices,
                        int64_t max_rank);

// Check A, B, and y [T, at least the slices' columns] (which a message calls `name`), and put them
// in; of y all but the pointer.
void set_a(ApplyParams& params, const Tensors& lora_a, const OptionalTensor& a_offsets,
           const Tensor& x);
void set_b(ApplyParams& params, const Tensors& lora_b, const OptionalTensor& b_offsets,
           const Tensor& x);
void set_y(ApplyParams& params, const char* name, const Tensor& y, const Tensor& x);

// All of that: everything but y's pointer and the workspace.
ApplyParams apply_params(const char* y_name, const Tensor& y, const Tensor& x,
                         const Tensors& lora_a, const Tensors& lora_b, const Tensor& ranks,
                         const Tensor& scalings, const Tensor& plan,
                         const std::vector<int64_t>& output_slices, int64_t max_rank,
                         const OptionalTensor& a_offsets, const OptionalTensor& b_offsets);

// Columns of y that the slices cover.
inline int32_t output_width(const Slices& slices) { return slices.offset[slices.count]; }

// Whether anything could be added to y.
inline bool has_work(const ApplyParams& params) {
  return params.num_tokens > 0 && output_width(params.slices) > 0;
}

// fp32 (fp64) elements.
int64_t workspace_elements(const ApplyParams& params, const Tensor& x);

// Allocates the workspace and launches.
void run_apply(const char* op, ApplyParams& params, const Tensor& x);

}  // namespace lora_ext
