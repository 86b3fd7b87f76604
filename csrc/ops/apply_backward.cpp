// lora_apply_backward: what lora_apply passes back to x, A and B. (The gradient of y is dy itself.)
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "ops/apply.h"
#include "ops/dispatch.h"

namespace lora_ext {
namespace {

Tensor zeros_like(const Tensor& tensor) {
  std::vector<int64_t> sizes(tensor.dim());
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    sizes[d] = tensor.size(d);
  }
  return torch::stable::new_zeros(tensor, sizes);
}

Tensors zeros_like(const Tensors& tensors) {
  Tensors zeros;
  for (const Tensor& tensor : tensors) {
    zeros.push_back(zeros_like(tensor));
  }
  return zeros;
}

// Zeros wherever nothing is added: tokens without an adapter, slots that the batch does not use,
// what lies behind a slot's rank. A gradient that is not wanted has no elements, or no tensors.
std::tuple<Tensor, Tensors, Tensors> lora_apply_backward(
    const Tensor dy, const Tensor x, const Tensors lora_a, const Tensors lora_b, const Tensor ranks,
    const Tensor scalings, const Tensor plan, const std::vector<int64_t> output_slices,
    int64_t max_rank, const OptionalTensor a_offsets, const OptionalTensor b_offsets, bool needs_dx,
    bool needs_da, bool needs_db) {
  ApplyBackwardParams params{};
  ApplyParams& apply = params.apply;
  apply = apply_params("dy", dy, x, lora_a, lora_b, ranks, scalings, plan, output_slices, max_rank,
                       a_offsets, b_offsets);
  apply.y = const_cast<void*>(dy.const_data_ptr());

  const Tensor dx = needs_dx ? zeros_like(x) : torch::stable::new_empty(x, std::vector<int64_t>{0});
  const Tensors da = needs_da ? zeros_like(lora_a) : Tensors{};
  const Tensors db = needs_db ? zeros_like(lora_b) : Tensors{};
  const bool is_empty = apply.num_tokens == 0 || apply.in_features == 0 ||
                        apply.slices.offset[apply.slices.count] == 0;
  if (is_empty || !(needs_dx || needs_da || needs_db)) {
    return {dx, da, db};
  }
  const Slots slots{apply.ranks, ranks.numel(), apply.plan};
  params.wants_da = needs_da;
  params.wants_db = needs_db;
  if (needs_da) {
    params.da = factor_a(da, a_offsets, apply.slices.count, max_rank, apply.in_features,
                         apply.dtype, slots, x);
  }
  if (needs_db) {
    params.db = factor_b(db, b_offsets, apply.slices, max_rank, apply.dtype, slots, x);
  }
  if (needs_dx) {
    params.dx = dx.mutable_data_ptr();
  }
  const auto intermediate = [&](bool needed) {
    const int64_t columns = int64_t{apply.slices.count} * apply.max_rank;
    return empty_accumulator(x, apply.dtype, {needed ? apply.num_tokens : 0, columns});
  };
  const Tensor g = intermediate(needs_dx || needs_da), xa = intermediate(needs_db);
  params.g = g.mutable_data_ptr();
  apply.workspace = xa.mutable_data_ptr();
  launch("lora_apply_backward", x, params, LORA_EXT_KERNEL(apply_backward));
  return {dx, da, db};
}

}  // namespace

LORA_EXT_IMPL(lora_apply_backward, lora_apply_backward)

}  // namespace lora_ext
