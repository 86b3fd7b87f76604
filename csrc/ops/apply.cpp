// lora_apply_: y += scaling * (x A^T) B^T, shrink and expand in one op; lora_apply is its
// functional form.
#include "ops/apply.h"

#include <torch/csrc/stable/ops.h>

#include "ops/dispatch.h"

namespace lora_ext {

ApplyParams apply_params(const char* y_name, const Tensor& y, const Tensor& x,
                         const Tensors& lora_a, const Tensors& lora_b, const Tensor& ranks,
                         const Tensor& scalings, const Tensor& plan,
                         const std::vector<int64_t>& output_slices, int64_t max_rank,
                         const OptionalTensor& a_offsets, const OptionalTensor& b_offsets) {
  const Matrix input = matrix_of("x", x);
  const Matrix output = matrix_of(y_name, y);
  const Slots slots = slots_of(ranks, plan, x);
  check(input.rows == output.rows, "x has ", input.rows, " tokens, ", y_name, " has ", output.rows);
  check(y.is_cuda() == x.is_cuda(), y_name, " is ", describe(y), ", x is ", describe(x));
  check_tokens("x", input.rows, slots.plan);

  ApplyParams params{};
  params.x = input.data;
  params.x_stride = input.stride;
  params.dtype = input.dtype;
  params.y_stride = output.stride;
  params.y_dtype = output.dtype;
  params.slices = slices_of(output_slices);
  const int32_t width = params.slices.offset[params.slices.count];
  check(output.columns >= width, y_name, " has ", output.columns, " columns, output_slices need ",
        width);
  params.max_rank = checked_rank(max_rank);
  params.a = factor_a(lora_a, a_offsets, params.slices.count, max_rank, input.columns, input.dtype,
                      slots, x);
  params.b = factor_b(lora_b, b_offsets, params.slices, max_rank, input.dtype, slots, x);
  params.ranks = slots.ranks;
  params.scalings = scalings_of(scalings, slots, x);
  params.plan = slots.plan;
  params.num_tokens = input.rows;
  params.in_features = input.columns;
  return params;
}

namespace {

void lora_apply_(const Tensor y, const Tensor x, const Tensors lora_a, const Tensors lora_b,
                 const Tensor ranks, const Tensor scalings, const Tensor plan,
                 const std::vector<int64_t> output_slices, int64_t max_rank,
                 const OptionalTensor a_offsets, const OptionalTensor b_offsets,
                 bool batch_invariant) {
  ApplyParams params = apply_params("y", y, x, lora_a, lora_b, ranks, scalings, plan, output_slices,
                                    max_rank, a_offsets, b_offsets);
  params.y = y.mutable_data_ptr();
  params.batch_invariant = batch_invariant;
  if (params.num_tokens == 0 || params.slices.offset[params.slices.count] == 0) {
    return;
  }
  int64_t elements = cpu::apply_workspace(params);
#ifdef LORA_EXT_CUDA
  if (x.is_cuda()) {
    elements = cuda::apply_workspace(params);
  }
#endif
  const Tensor workspace = empty_accumulator(x, params.dtype, {elements});
  params.workspace = workspace.mutable_data_ptr();
  launch("lora_apply_", x, params, LORA_EXT_KERNEL(apply));
}

Tensor lora_apply(const Tensor y, const Tensor x, const Tensors lora_a, const Tensors lora_b,
                  const Tensor ranks, const Tensor scalings, const Tensor plan,
                  const std::vector<int64_t> output_slices, int64_t max_rank,
                  const OptionalTensor a_offsets, const OptionalTensor b_offsets,
                  bool batch_invariant) {
  Tensor out = torch::stable::clone(y);
  lora_apply_(out, x, lora_a, lora_b, ranks, scalings, plan, output_slices, max_rank, a_offsets,
              b_offsets, batch_invariant);
  return out;
}

}  // namespace

LORA_EXT_IMPL(lora_apply_, lora_apply_)
LORA_EXT_IMPL(lora_apply, lora_apply)

}  // namespace lora_ext
