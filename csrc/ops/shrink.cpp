// lora_shrink: xa = scaling * x A^T, each token with the A of its slot.
#include "ops/dispatch.h"

namespace lora_ext {
namespace {

Tensor lora_shrink(const Tensor x, const Tensors lora_a, const Tensor ranks, const Tensor scalings,
                   const Tensor plan, int64_t num_slices, int64_t max_rank,
                   const OptionalTensor a_offsets) {
  const Matrix input = matrix_of("x", x);
  const Slots slots = slots_of(ranks, plan, x);
  check(num_slices >= 1 && num_slices <= kMaxSlices, "num_slices must be between 1 and ",
        kMaxSlices, ", got ", num_slices);
  check_tokens("x", input.rows, slots.plan);

  ShrinkParams params{};
  params.x = input.data;
  params.x_stride = input.stride;
  params.dtype = input.dtype;
  params.max_rank = checked_rank(max_rank);
  params.a =
      factor_a(lora_a, a_offsets, num_slices, max_rank, input.columns, input.dtype, slots, x);
  params.ranks = slots.ranks;
  params.scalings = scalings_of(scalings, slots, x);
  params.plan = slots.plan;
  params.num_tokens = input.rows;
  params.in_features = input.columns;
  params.num_slices = static_cast<int32_t>(num_slices);

  Tensor xa = empty_accumulator(x, input.dtype, {input.rows, num_slices * max_rank});
  params.xa = xa.mutable_data_ptr();
  params.xa_stride = num_slices * max_rank;
  params.fill = true;
  if (input.rows > 0) {
    launch("lora_shrink", x, params, LORA_EXT_KERNEL(shrink));
  }
  return xa;
}

}  // namespace

LORA_EXT_IMPL(lora_shrink, lora_shrink)

}  // namespace lora_ext
