// lora_expand_: y += xa B^T in place, each token with the B of its slot.
#include "ops/dispatch.h"

namespace lora_ext {
namespace {

void lora_expand_(const Tensor y, const Tensor xa, const Tensors lora_b, const Tensor ranks,
                  const Tensor plan, const std::vector<int64_t> output_slices, int64_t max_rank,
                  const OptionalTensor b_offsets) {
  const Matrix output = matrix_of("y", y);
  const Matrix input = matrix_of("xa", xa);
  const Slots slots = slots_of(ranks, plan, y);
  check(!lora_b.empty(), "lora_b is empty");

  ExpandParams params{};
  params.slices = slices_of(output_slices);
  params.max_rank = checked_rank(max_rank);
  params.dtype = float_dtype("lora_b", lora_b[0]);
  params.y_dtype = output.dtype;
  params.b = factor_b(lora_b, b_offsets, params.slices, max_rank, params.dtype, slots, y);
  const DType accumulator = params.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  check(input.dtype == accumulator, "xa must be ",
        accumulator == DType::kFloat32 ? "float32" : "float64", ", got ", describe(xa));
  check(input.columns >= params.slices.count * max_rank, "xa has ", input.columns,
        " columns, expected ", params.slices.count * max_rank, " for ", params.slices.count,
        " slices of max_rank ", max_rank);
  check(input.rows == output.rows, "xa has ", input.rows, " tokens, y has ", output.rows);
  const int32_t width = params.slices.offset[params.slices.count];
  check(output.columns >= width, "y has ", output.columns, " columns, output_slices need ", width);
  check(xa.is_cuda() == y.is_cuda(), "xa is ", describe(xa), ", y is ", describe(y));
  check_tokens("y", output.rows, slots.plan);

  params.xa = input.data;
  params.xa_stride = input.stride;
  params.y = y.mutable_data_ptr();
  params.y_stride = output.stride;
  params.ranks = slots.ranks;
  params.plan = slots.plan;
  params.num_tokens = output.rows;
  if (output.rows > 0 && width > 0) {
    launch("lora_expand_", y, params, LORA_EXT_KERNEL(expand));
  }
}

}  // namespace

LORA_EXT_IMPL(lora_expand_, lora_expand_)

}  // namespace lora_ext
