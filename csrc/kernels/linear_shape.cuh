// From a lora_linear's arguments to what its heuristics are told, common to its kernels.
#pragma once

#include "kernels/launch.cuh"
#include "kernels/linear_heuristics.h"

namespace lora_ext::cuda {

// `capable`, and what else a kernel asks of the rows, is the kernel's to say.
inline LinearShape linear_shape_of(const LinearParams& p) {
  LinearShape shape{};
  shape.num_tokens = p.apply.num_tokens;
  shape.num_slots = p.apply.plan.num_slots;
  shape.in_features = p.apply.in_features;
  shape.out_features = p.out_features;
  shape.num_slices = p.apply.slices.count;
  shape.max_rank = p.apply.max_rank;
  shape.sm_count = device_properties().sm_count;
  shape.half = p.apply.dtype == DType::kFloat16 || p.apply.dtype == DType::kBFloat16;
  shape.vector = is_multiple(p.apply.x, p.apply.x_stride, 8, 16) &&
                 is_multiple(p.weight, p.weight_stride, 8, 16) && p.apply.in_features % 8 == 0;
  shape.batch_invariant = p.apply.batch_invariant;
  return shape;
}

// Whether y allows stores of two neighbours.
inline bool has_pairs(const LinearParams& p) {
  return is_multiple(p.apply.y, p.apply.y_stride, 2, 4) && p.out_features % 2 == 0;
}

}  // namespace lora_ext::cuda
