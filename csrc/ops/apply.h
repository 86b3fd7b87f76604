// What lora_apply and its gradient have in common: the checks of their arguments.
#pragma once

#include "ops/arguments.h"

namespace lora_ext {

// Everything but y and the workspace; `y_name` is what a message calls y.
ApplyParams apply_params(const char* y_name, const Tensor& y, const Tensor& x,
                         const Tensors& lora_a, const Tensors& lora_b, const Tensor& ranks,
                         const Tensor& scalings, const Tensor& plan,
                         const std::vector<int64_t>& output_slices, int64_t max_rank,
                         const OptionalTensor& a_offsets, const OptionalTensor& b_offsets);

}  // namespace lora_ext
