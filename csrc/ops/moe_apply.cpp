// moe_lora_apply_: y += weight * scaling * (x A^T) B^T, each routed pair with the adapter of its
// (slot, expert).
#include <limits>

#include "ops/dispatch.h"

namespace lora_ext {
namespace {

// [L, E or 1, rows, columns], the experts at any stride: 0 and a size of 1 say that they share.
struct ExpertPool {
  int64_t num_experts, rows, columns, slot_stride, expert_stride, row_stride;
};
ExpertPool expert_pool(const char* name, const Tensor& tensor, DType dtype, int64_t num_slots,
                       const Tensor& like) {
  check(tensor.dim() == 4, name, " must be [slots, experts or 1, rows, columns], got ",
        describe(tensor));
  check(tensor.size(0) == num_slots, name, " has ", tensor.size(0), " slots, ranks has ",
        num_slots);
  check(tensor.size(1) >= 1, name, " has no experts: ", describe(tensor));
  check(tensor.stride(3) == 1 || tensor.size(3) <= 1, name,
        " must be contiguous in its last dimension, got stride ", tensor.stride(3));
  check(float_dtype(name, tensor) == dtype, name, " is ", describe(tensor),
        ", but x, A and B must share one dtype");
  check(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(),
        name, " is ", describe(tensor), ", x is ", describe(like));
  return {tensor.size(1),
          tensor.size(2),
          tensor.size(3),
          tensor.stride(0),
          tensor.size(1) == 1 ? 0 : tensor.stride(1),
          tensor.stride(2)};
}

// The experts of A and B: one number, wherever it is not 1.
void join_experts(const char* name, const ExpertPool& pool, int64_t& num_experts) {
  check(pool.num_experts == 1 || num_experts == 1 || pool.num_experts == num_experts, name, " has ",
        pool.num_experts, " experts, other weights have ", num_experts);
  num_experts = std::max(num_experts, pool.num_experts);
}

MoeFactor expert_factor(const char* name, const Tensors& tensors, const Slices& slices,
                        int64_t max_rank, int64_t in_features, bool is_a, DType dtype,
                        int64_t num_slots, const Tensor& like, int64_t& num_experts) {
  const auto count = static_cast<int64_t>(tensors.size());
  check(count == 1 || count == slices.count, name,
        " must be one packed tensor or one tensor per slice (", slices.count, "), got ", count,
        " tensors");
  MoeFactor factor{};
  factor.rows_by_rank = is_a && count == 1;
  for (int i = 0; i < slices.count; ++i) {
    const Tensor& tensor = tensors[count == 1 ? 0 : i];
    const ExpertPool pool = expert_pool(name, tensor, dtype, num_slots, like);
    join_experts(name, pool, num_experts);
    if (is_a) {
      const int64_t rows = count == 1 ? slices.count * max_rank : max_rank;
      check(pool.rows >= rows && pool.columns == in_features, name, " is ", describe(tensor),
            ", expected [", num_slots, ", experts or 1, at least ", rows, ", ", in_features,
            "] for max_rank ", max_rank, " and x with ", in_features, " columns");
    } else {
      const int64_t rows =
          count == 1 ? slices.offset[slices.count] : slices.offset[i + 1] - slices.offset[i];
      check(pool.rows == rows && pool.columns >= max_rank, name, " is ", describe(tensor),
            ", expected [", num_slots, ", experts or 1, ", rows, ", at least ", max_rank,
            "] for output_slices and max_rank ", max_rank);
      factor.first_row[i] = count == 1 ? slices.offset[i] : 0;
    }
    factor.base[i] = tensor.const_data_ptr();
    factor.slot_stride[i] = pool.slot_stride;
    factor.expert_stride[i] = pool.expert_stride;
    factor.row_stride[i] = pool.row_stride;
  }
  return factor;
}

// y [P, columns] or [T, k, columns], its rows one stride apart.
Matrix pairs_of(const Tensor& y, int64_t top_k) {
  check(y.dim() == 2 || y.dim() == 3, "y must be [tokens * top_k, features] or [tokens, top_k, ",
        "features], got ", describe(y));
  const int64_t last = y.dim() - 1;
  check(y.stride(last) == 1 || y.size(last) <= 1,
        "y must be contiguous in its last dimension, got stride ", y.stride(last));
  const DType dtype = float_dtype("y", y);
  if (y.dim() == 2) {
    return {y.const_data_ptr(), y.size(0), y.size(1), y.stride(0), dtype};
  }
  check(y.size(1) == top_k, "y is ", describe(y), ", top_k is ", top_k);
  check(y.size(0) <= 1 || top_k == 1 || y.stride(0) == top_k * y.stride(1),
        "y's pairs must be one stride apart, got strides ", y.stride(0), " and ", y.stride(1),
        " for ", describe(y));
  return {y.const_data_ptr(), y.size(0) * top_k, y.size(2), top_k == 1 ? y.stride(0) : y.stride(1),
          dtype};
}

void set_columns(MoeApplyParams& params, const std::optional<std::vector<int64_t>>& column_starts,
                 int64_t column_stride, int64_t num_columns) {
  check(column_stride >= 1, "column_stride is ", column_stride, ", expected at least 1");
  check(!column_starts.has_value() ||
            static_cast<int64_t>(column_starts->size()) == params.slices.count,
        "column_starts has ", column_starts.has_value() ? column_starts->size() : 0,
        " entries, output_slices has ", params.slices.count);
  params.column_stride = column_stride;
  for (int i = 0; i < params.slices.count; ++i) {
    const int64_t width = params.slices.offset[i + 1] - params.slices.offset[i];
    const int64_t start = column_starts.has_value() ? (*column_starts)[i] : params.slices.offset[i];
    check(start >= 0, "column_starts[", i, "] is ", start);
    check(width == 0 || start + (width - 1) * column_stride < num_columns, "slice ", i,
          " ends at column ", start + (width - 1) * column_stride, ", y has ", num_columns,
          " columns");
    params.column_start[i] = start;
  }
}

// On a GPU looking would be a synchronisation: there, a tile of a slot or expert that the weights
// do not have is left out.
void check_on_host(const MoeApplyParams& params, int64_t elements) {
  const int64_t num_tiles = params.routing[kNumMoeTiles],
                num_routed = params.routing[kNumRoutedPairs],
                permutation = params.routing[kPermutationOffset];
  check(num_tiles >= 0 && num_routed >= 0 && permutation >= kRoutingHeaderSize + 4 * num_tiles &&
            permutation + num_routed <= elements,
        "routing holds nothing that moe_lora_align_ has written");
  for (int64_t i = 0; i < num_tiles; ++i) {
    const MoeTile& tile = moe_tiles(params.routing)[i];
    check(tile.slot >= 0 && tile.slot < params.num_slots, "routing was made for more slots than ",
          params.num_slots, ": slot ", tile.slot);
    check(tile.expert >= 0 && tile.expert < params.num_experts,
          "routing was made for more experts than ", params.num_experts, ": expert ", tile.expert);
  }
}

void moe_lora_apply_(const Tensor y, const Tensor x, const Tensors lora_a, const Tensors lora_b,
                     const Tensor ranks, const Tensor scalings, const Tensor routing, int64_t top_k,
                     const std::vector<int64_t> output_slices, int64_t max_rank,
                     const std::optional<std::vector<int64_t>> column_starts, int64_t column_stride,
                     const OptionalTensor topk_weights) {
  check(top_k >= 1 && top_k <= std::numeric_limits<int32_t>::max(), "top_k is ", top_k,
        ", expected at least 1");
  const Matrix input = matrix_of("x", x);
  const Matrix output = pairs_of(y, top_k);
  check(y.is_cuda() == x.is_cuda() && y.get_device_index() == x.get_device_index(), "y is ",
        describe(y), ", x is ", describe(x));
  check(output.rows % top_k == 0, "y has ", output.rows, " rows, no multiple of top_k ", top_k);
  check(input.rows == output.rows || input.rows * top_k == output.rows, "x has ", input.rows,
        " rows, expected ", output.rows / top_k, " (tokens) or ", output.rows, " (pairs) for y ",
        describe(y), " and top_k ", top_k);

  MoeApplyParams params{};
  params.x = input.data;
  params.x_stride = input.stride;
  params.x_divisor = input.rows == output.rows ? 1 : static_cast<int32_t>(top_k);
  params.y = y.mutable_data_ptr();
  params.y_stride = output.stride;
  params.dtype = input.dtype;
  params.y_dtype = output.dtype;
  params.num_pairs = output.rows;
  params.in_features = input.columns;
  params.ranks = int32_vector("ranks", ranks, x);
  params.num_slots = static_cast<int32_t>(ranks.numel());
  params.scalings = float_vector("scalings", scalings, x);
  check(scalings.numel() == ranks.numel(), "scalings has ", scalings.numel(),
        " entries, ranks has ", ranks.numel());
  params.slices = slices_of(output_slices);
  params.max_rank = checked_rank(max_rank);
  set_columns(params, column_starts, column_stride, output.columns);
  int64_t num_experts = 1;
  const auto factor = [&](const char* name, const Tensors& tensors, bool is_a) {
    return expert_factor(name, tensors, params.slices, max_rank, input.columns, is_a, input.dtype,
                         params.num_slots, x, num_experts);
  };
  params.a = factor("lora_a", lora_a, true);
  params.b = factor("lora_b", lora_b, false);
  params.num_experts =
      num_experts == 1 ? std::numeric_limits<int32_t>::max() : static_cast<int32_t>(num_experts);
  params.routing = int32_vector("routing", routing, x);
  params.routing_size = routing.numel();
  check(routing.numel() >= kRoutingHeaderSize &&
            reinterpret_cast<uintptr_t>(params.routing) % alignof(MoeTile) == 0,
        "routing has ", routing.numel(), " elements or does not start at a multiple of 16 bytes: ",
        "expected what moe_lora_align_ has written");
  if (topk_weights.has_value()) {
    params.weights_dtype = float_dtype("topk_weights", *topk_weights);
    check(params.weights_dtype == DType::kFloat32 || params.weights_dtype == input.dtype,
          "topk_weights must be float32 or of x's dtype, got ", describe(*topk_weights));
    check(topk_weights->numel() == output.rows && topk_weights->is_contiguous(),
          "topk_weights must be contiguous and have an entry for each of the ", output.rows,
          " pairs of y, got ", describe(*topk_weights));
    check(topk_weights->is_cuda() == x.is_cuda() &&
              topk_weights->get_device_index() == x.get_device_index(),
          "topk_weights is ", describe(*topk_weights), ", x is ", describe(x));
    params.topk_weights = topk_weights->const_data_ptr();
  }
  if (output.rows == 0 || input.columns == 0 || params.slices.offset[params.slices.count] == 0) {
    return;
  }
  if (x.is_cpu()) {
    check_on_host(params, routing.numel());
  }
  int64_t bytes = cpu::moe_apply_workspace(params);
#ifdef LORA_EXT_CUDA
  if (x.is_cuda()) {
    bytes = cuda::moe_apply_workspace(params);
  }
#endif
  const Tensor workspace = empty_accumulator(x, DType::kFloat32, {(bytes + 3) / 4});
  params.workspace = workspace.mutable_data_ptr();
  launch("moe_lora_apply_", x, params, LORA_EXT_KERNEL(moe_apply));
}

}  // namespace

LORA_EXT_IMPL(moe_lora_apply_, moe_lora_apply_)

}  // namespace lora_ext
