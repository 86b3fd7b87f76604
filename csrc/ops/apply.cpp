// lora_apply_: y += scaling * (x A^T) B^T, shrink and expand in one op; lora_apply is its
// functional form.
#include "ops/apply.h"

#include <torch/csrc/stable/ops.h>

#include "ops/dispatch.h"

namespace lora_ext {
namespace {

Slots slots_of(const ApplyParams& params) {
  return {params.ranks, params.plan.num_slots, params.plan};
}

}  // namespace

ApplyParams apply_input(const Tensor& x, const Tensor& ranks, const Tensor& scalings,
                        const Tensor& plan, const std::vector<int64_t>& output_slices,
                        int64_t max_rank) {
  const Matrix input = matrix_of("x", x);
  const Slots slots = slots_of(ranks, plan, x);
  check_tokens("x", input.rows, slots.plan);
  ApplyParams params{};
  params.x = input.data;
  params.x_stride = input.stride;
  params.dtype = input.dtype;
  params.ranks = slots.ranks;
  params.scalings = scalings_of(scalings, slots, x);
  params.plan = slots.plan;
  params.num_tokens = input.rows;
  params.in_features = input.columns;
  params.slices = slices_of(output_slices);
  params.max_rank = checked_rank(max_rank);
  return params;
}

void set_a(ApplyParams& params, const Tensors& lora_a, const OptionalTensor& a_offsets,
           const Tensor& x) {
  params.a = factor_a(lora_a, a_offsets, params.slices.count, params.max_rank, params.in_features,
                      params.dtype, slots_of(params), x);
}

void set_b(ApplyParams& params, const Tensors& lora_b, const OptionalTensor& b_offsets,
           const Tensor& x) {
  params.b = factor_b(lora_b, b_offsets, params.slices, params.max_rank, params.dtype,
                      slots_of(params), x);
}

void set_y(ApplyParams& params, const char* name, const Tensor& y, const Tensor& x) {
  const Matrix output = matrix_of(name, y);
  check(params.num_tokens == output.rows, "x has ", params.num_tokens, " tokens, ", name, " has ",
        output.rows);
  check(y.is_cuda() == x.is_cuda(), name, " is ", describe(y), ", x is ", describe(x));
  const int32_t width = output_width(params.slices);
  check(output.columns >= width, name, " has ", output.columns, " columns, output_slices need ",
        width);
  params.y_stride = output.stride;
  params.y_dtype = output.dtype;
}

ApplyParams apply_params(const char* y_name, const Tensor& y, const Tensor& x,
                         const Tensors& lora_a, const Tensors& lora_b, const Tensor& ranks,
                         const Tensor& scalings, const Tensor& plan,
                         const std::vector<int64_t>& output_slices, int64_t max_rank,
                         const OptionalTensor& a_offsets, const OptionalTensor& b_offsets) {
  ApplyParams params = apply_input(x, ranks, scalings, plan, output_slices, max_rank);
  set_y(params, y_name, y, x);
  set_a(params, lora_a, a_offsets, x);
  set_b(params, lora_b, b_offsets, x);
  return params;
}

int64_t workspace_elements(const ApplyParams& params, const Tensor& x) {
  if (!has_work(params)) {
    return 0;
  }
#ifdef LORA_EXT_CUDA
  if (x.is_cuda()) {
    return cuda::apply_workspace(params);
  }
#endif
  (void)x;
  return cpu::apply_workspace(params);
}

void run_apply(const char* op, ApplyParams& params, const Tensor& x) {
  if (!has_work(params)) {
    return;
  }
  const Tensor workspace = empty_accumulator(x, params.dtype, {workspace_elements(params, x)});
  params.workspace = workspace.mutable_data_ptr();
  launch(op, x, params, LORA_EXT_KERNEL(apply));
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
  run_apply("lora_apply_", params, x);
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
