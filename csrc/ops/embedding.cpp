// lora_embedding: xa[t] = scaling * column ids[t] of A; lora_embedding_apply_ expands it into y at
// once.
#include <torch/headeronly/core/ScalarType.h>

#include "ops/dispatch.h"

namespace lora_ext {
namespace {

using torch::headeronly::ScalarType;

EmbeddingParams gather(const Tensor& ids, const Tensor& lora_a, const Slots& slots,
                       const Tensor& scalings, int64_t vocab_start, const OptionalTensor& extra_a,
                       const Tensor& xa) {
  EmbeddingParams params{};
  params.ids = ids.const_data_ptr();
  params.ids_are_int64 = ids.scalar_type() == ScalarType::Long;
  params.a = lora_a.const_data_ptr();
  params.a_slot_stride = lora_a.stride(0);
  params.a_rank_stride = lora_a.stride(1);
  params.a_vocab_stride = lora_a.stride(2);
  params.dtype = float_dtype("lora_a", lora_a);
  if (extra_a.has_value()) {
    params.extra_a = extra_a->const_data_ptr();
    params.extra_slot_stride = extra_a->stride(0);
    params.extra_token_stride = extra_a->stride(1);
    params.num_extra = extra_a->size(1);
  }
  params.ranks = slots.ranks;
  params.scalings = scalings_of(scalings, slots, ids);
  params.plan = slots.plan;
  params.num_tokens = ids.numel();
  params.vocab_start = vocab_start;
  params.vocab_size = lora_a.size(2);
  params.max_rank = checked_rank(lora_a.size(1));
  params.xa = xa.mutable_data_ptr();
  params.xa_stride = lora_a.size(1);
  return params;
}

Slots check_gather(const Tensor& ids, const Tensor& lora_a, const Tensor& ranks, const Tensor& plan,
                   const OptionalTensor& extra_a) {
  check(ids.dim() == 1 && ids.is_contiguous() &&
            (ids.scalar_type() == ScalarType::Int || ids.scalar_type() == ScalarType::Long),
        "ids must be a contiguous 1-D int32 or int64 tensor, got ", describe(ids));
  const Slots slots = slots_of(ranks, plan, ids);
  check(lora_a.dim() == 3 && lora_a.size(0) == slots.num_slots && lora_a.is_cuda() == ids.is_cuda(),
        "lora_a is ", describe(lora_a), ", expected [", slots.num_slots,
        ", R, V] on the device of ids");
  if (extra_a.has_value()) {
    check(extra_a->dim() == 3 && extra_a->size(0) == slots.num_slots &&
              extra_a->size(2) == lora_a.size(1) &&
              (extra_a->stride(2) == 1 || extra_a->size(2) == 1) &&
              extra_a->scalar_type() == lora_a.scalar_type() && extra_a->is_cuda() == ids.is_cuda(),
          "extra_a is ", describe(*extra_a), ", expected [", slots.num_slots, ", X, ",
          lora_a.size(1), "] of the dtype and device of lora_a, contiguous in its last dimension");
  }
  check_tokens("ids", ids.numel(), slots.plan);
  return slots;
}

Tensor lora_embedding(const Tensor ids, const Tensor lora_a, const Tensor ranks,
                      const Tensor scalings, const Tensor plan, int64_t vocab_start,
                      const OptionalTensor extra_a) {
  const Slots slots = check_gather(ids, lora_a, ranks, plan, extra_a);
  Tensor xa = empty_accumulator(ids, float_dtype("lora_a", lora_a), {ids.numel(), lora_a.size(1)});
  EmbeddingParams params = gather(ids, lora_a, slots, scalings, vocab_start, extra_a, xa);
  if (ids.numel() > 0) {
    launch("lora_embedding", ids, params, LORA_EXT_KERNEL(embedding));
  }
  return xa;
}

void lora_embedding_apply_(const Tensor y, const Tensor ids, const Tensor lora_a,
                           const Tensor lora_b, const Tensor ranks, const Tensor scalings,
                           const Tensor plan, int64_t vocab_start, const OptionalTensor extra_a) {
  const Slots slots = check_gather(ids, lora_a, ranks, plan, extra_a);
  const Matrix output = matrix_of("y", y);
  check(output.rows == ids.numel(), "ids has ", ids.numel(), " tokens, y has ", output.rows);
  check(y.is_cuda() == ids.is_cuda(), "y is ", describe(y), ", ids is ", describe(ids));
  const DType dtype = float_dtype("lora_a", lora_a);
  Tensor xa = empty_accumulator(ids, dtype, {ids.numel(), lora_a.size(1)});
  EmbeddingParams params = gather(ids, lora_a, slots, scalings, vocab_start, extra_a, xa);

  ExpandParams expand{};
  check(lora_b.dim() >= 3, "lora_b must be [slots, N, R], got ", describe(lora_b));
  expand.slices = slices_of({lora_b.size(lora_b.dim() - 2)});
  check(output.columns >= expand.slices.offset[1], "y has ", output.columns,
        " columns, lora_b has ", expand.slices.offset[1], " rows");
  expand.b = factor_b({lora_b}, std::nullopt, expand.slices, lora_a.size(1), dtype, slots, ids);
  expand.xa = params.xa;
  expand.xa_stride = params.xa_stride;
  expand.y = y.mutable_data_ptr();
  expand.y_stride = output.stride;
  expand.dtype = dtype;
  expand.y_dtype = output.dtype;
  expand.ranks = slots.ranks;
  expand.plan = slots.plan;
  expand.num_tokens = output.rows;
  expand.max_rank = params.max_rank;
  expand.after_xa = true;
  if (output.rows > 0 && output.columns > 0) {
    EmbeddingApplyParams both{params, expand, nullptr};
    launch("lora_embedding_apply_", ids, both, LORA_EXT_KERNEL(embedding_apply));
  }
}

}  // namespace

LORA_EXT_IMPL(lora_embedding, lora_embedding)
LORA_EXT_IMPL(lora_embedding_apply_, lora_embedding_apply_)

}  // namespace lora_ext
