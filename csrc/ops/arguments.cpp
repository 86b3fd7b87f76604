#include "ops/arguments.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <limits>

namespace lora_ext {
namespace {

using torch::headeronly::ScalarType;

void check_device(const char* name, const Tensor& tensor, const Tensor& like) {
  check(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(),
        name, " is ", describe(tensor), ", but the other arguments are on ",
        like.is_cuda() ? "cuda:" : "cpu",
        like.is_cuda() ? std::to_string(like.get_device_index()) : "");
}

void check_vector(const char* name, const Tensor& tensor, ScalarType type, const char* type_name,
                  const Tensor& like) {
  check(tensor.dim() == 1 && tensor.scalar_type() == type && tensor.is_contiguous(), name,
        " must be a contiguous 1-D ", type_name, " tensor, got ", describe(tensor));
  check_device(name, tensor, like);
}

std::string indexed(const char* name, size_t count, size_t index) {
  return count == 1 ? std::string(name) : std::string(name) + "[" + std::to_string(index) + "]";
}

// [L, rows, columns] with any unit dimensions between the first and the last two, as engines have
// them.
struct Pool {
  int64_t rows, columns, slot_stride, row_stride;
};
Pool pool_of(const std::string& name, const Tensor& tensor, DType dtype, const Slots& slots,
             const Tensor& like) {
  const int64_t dim = tensor.dim();
  check(dim >= 3, name, " must be [slots, rows, columns], got ", describe(tensor));
  for (int64_t d = 1; d < dim - 2; ++d) {
    check(tensor.size(d) == 1, name,
          " may only have dimensions of size 1 between the slots and the last two, got ",
          describe(tensor));
  }
  check(tensor.size(0) == slots.num_slots, name, " has ", tensor.size(0), " slots, ranks has ",
        slots.num_slots);
  check(tensor.stride(dim - 1) == 1 || tensor.size(dim - 1) <= 1, name,
        " must be contiguous in its last dimension, got stride ", tensor.stride(dim - 1));
  check(float_dtype(name.c_str(), tensor) == dtype, name, " is ", describe(tensor),
        ", but x, A and B must share one dtype");
  check_device(name.c_str(), tensor, like);
  return {tensor.size(dim - 2), tensor.size(dim - 1), tensor.stride(0), tensor.stride(dim - 2)};
}

Factor flat_factor(const char* name, const Tensors& buffers, const Tensor& offsets,
                   int64_t num_slices, DType dtype, const Slots& slots, const Tensor& like) {
  check(buffers.size() == 1 && buffers[0].dim() == 1 && buffers[0].is_contiguous(), name,
        " with offsets must be one contiguous 1-D buffer, got ", buffers.size(),
        " tensors, the first ", buffers.empty() ? "none" : describe(buffers[0]));
  check(float_dtype(name, buffers[0]) == dtype, name, " is ", describe(buffers[0]),
        ", but x, A and B must share one dtype");
  check_device(name, buffers[0], like);
  const std::string offsets_name = std::string(name) + " offsets";
  Factor factor{};
  factor.slot_offsets = int64_vector(offsets_name.c_str(), offsets, like);
  check(offsets.numel() == slots.num_slots, offsets_name, " has ", offsets.numel(),
        " entries, ranks has ", slots.num_slots);
  for (int64_t i = 0; i < num_slices; ++i) {
    factor.base[i] = buffers[0].const_data_ptr();
  }
  return factor;
}

}  // namespace

std::string describe(const Tensor& tensor) {
  std::ostringstream text;
  text << torch::headeronly::toString(tensor.scalar_type()) << " [";
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    text << (d != 0 ? ", " : "") << tensor.size(d);
  }
  text << "] on " << (tensor.is_cuda() ? "cuda:" : "cpu");
  if (tensor.is_cuda()) {
    text << tensor.get_device_index();
  }
  return text.str();
}

DType float_dtype(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Double:
      check(!tensor.is_cuda(), name, " is float64, which only the CPU kernels take");
      return DType::kFloat64;
    default:
      fail(name, " must be bfloat16, float16 or float32, got ", describe(tensor));
  }
}

const int32_t* int32_vector(const char* name, const Tensor& tensor, const Tensor& like) {
  check_vector(name, tensor, ScalarType::Int, "int32", like);
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

const int64_t* int64_vector(const char* name, const Tensor& tensor, const Tensor& like) {
  check_vector(name, tensor, ScalarType::Long, "int64", like);
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

const float* float_vector(const char* name, const Tensor& tensor, const Tensor& like) {
  check_vector(name, tensor, ScalarType::Float, "float32", like);
  return static_cast<const float*>(tensor.const_data_ptr());
}

Slots slots_of(const Tensor& ranks, const Tensor& plan, const Tensor& like) {
  const int32_t* rank_data = int32_vector("ranks", ranks, like);
  const int64_t num_slots = ranks.numel();
  check_vector("plan", plan, ScalarType::Int, "int32", like);
  const int64_t max_tokens = plan_max_tokens(plan.numel(), num_slots);
  check(max_tokens >= 0, "plan has ", plan.numel(),
        " elements, which is no plan_size(max_tokens, num_slots) for the ", num_slots,
        " slots of ranks");
  return {rank_data, num_slots,
          plan_view(static_cast<int32_t*>(plan.data_ptr()), max_tokens, num_slots)};
}

const float* scalings_of(const Tensor& scalings, const Slots& slots, const Tensor& like) {
  const float* data = float_vector("scalings", scalings, like);
  check(scalings.numel() == slots.num_slots, "scalings has ", scalings.numel(),
        " entries, ranks has ", slots.num_slots);
  return data;
}

Matrix matrix_of(const char* name, const Tensor& tensor) {
  check(tensor.dim() == 2, name, " must be 2-D, [tokens, features], got ", describe(tensor));
  check(tensor.stride(1) == 1 || tensor.size(1) <= 1, name,
        " must be contiguous in its last dimension, got stride ", tensor.stride(1));
  return {tensor.const_data_ptr(), tensor.size(0), tensor.size(1), tensor.stride(0),
          float_dtype(name, tensor)};
}

void check_tokens(const char* name, int64_t num_tokens, const PlanView& plan) {
  check(num_tokens <= plan.max_tokens, name, " has ", num_tokens, " tokens, the plan has room for ",
        plan.max_tokens);
}

int32_t checked_rank(int64_t max_rank) {
  check(max_rank >= 1 && max_rank <= kMaxRank, "max_rank must be between 1 and ", kMaxRank,
        ", got ", max_rank);
  return static_cast<int32_t>(max_rank);
}

Slices slices_of(const std::vector<int64_t>& output_slices) {
  check(!output_slices.empty() && output_slices.size() <= kMaxSlices,
        "output_slices must have 1 to ", kMaxSlices, " entries, got ", output_slices.size());
  Slices slices{};
  slices.count = static_cast<int32_t>(output_slices.size());
  int64_t end = 0;
  for (size_t i = 0; i < output_slices.size(); ++i) {
    check(output_slices[i] >= 0, "output_slices[", i, "] is ", output_slices[i]);
    end += output_slices[i];
    check(end <= std::numeric_limits<int32_t>::max(),
          "output_slices add up to more than 2^31 - 1 features");
    slices.offset[i + 1] = static_cast<int32_t>(end);
  }
  return slices;
}

Factor factor_a(const Tensors& lora_a, const OptionalTensor& offsets, int64_t num_slices,
                int64_t max_rank, int64_t in_features, DType dtype, const Slots& slots,
                const Tensor& like) {
  if (offsets.has_value()) {
    Factor factor = flat_factor("lora_a", lora_a, *offsets, num_slices, dtype, slots, like);
    for (int64_t i = 0; i < num_slices; ++i) {
      factor.row_stride[i] = in_features;
    }
    factor.rows_by_rank = true;
    return factor;
  }
  const int64_t count = static_cast<int64_t>(lora_a.size());
  check(count == 1 || count == num_slices,
        "lora_a must be one packed tensor or one tensor per slice (", num_slices, "), got ", count,
        " tensors");
  Factor factor{};
  factor.rows_by_rank = count == 1;
  for (int64_t i = 0; i < num_slices; ++i) {
    const size_t at = count == 1 ? 0 : static_cast<size_t>(i);
    const std::string name = indexed("lora_a", lora_a.size(), at);
    const Pool pool = pool_of(name, lora_a[at], dtype, slots, like);
    const int64_t rows = count == 1 ? num_slices * max_rank : max_rank;
    check(pool.rows >= rows && pool.columns == in_features, name, " is ", describe(lora_a[at]),
          ", expected [", slots.num_slots, ", at least ", rows, ", ", in_features,
          "] for max_rank ", max_rank, " and x with ", in_features, " columns");
    factor.base[i] = lora_a[at].const_data_ptr();
    factor.slot_stride[i] = pool.slot_stride;
    factor.row_stride[i] = pool.row_stride;
  }
  return factor;
}

Factor factor_b(const Tensors& lora_b, const OptionalTensor& offsets, const Slices& slices,
                int64_t max_rank, DType dtype, const Slots& slots, const Tensor& like) {
  if (offsets.has_value()) {
    Factor factor = flat_factor("lora_b", lora_b, *offsets, slices.count, dtype, slots, like);
    for (int i = 0; i < slices.count; ++i) {
      factor.first_row[i] = slices.offset[i];
    }
    return factor;
  }
  const int64_t count = static_cast<int64_t>(lora_b.size());
  check(count == 1 || count == slices.count,
        "lora_b must be one packed tensor or one tensor per slice (", slices.count, "), got ",
        count, " tensors");
  Factor factor{};
  for (int i = 0; i < slices.count; ++i) {
    const size_t at = count == 1 ? 0 : static_cast<size_t>(i);
    const std::string name = indexed("lora_b", lora_b.size(), at);
    const Pool pool = pool_of(name, lora_b[at], dtype, slots, like);
    const int64_t rows =
        count == 1 ? slices.offset[slices.count] : slices.offset[i + 1] - slices.offset[i];
    check(pool.rows == rows && pool.columns >= max_rank, name, " is ", describe(lora_b[at]),
          ", expected [", slots.num_slots, ", ", rows, ", at least ", max_rank,
          "] for output_slices and max_rank ", max_rank);
    factor.base[i] = lora_b[at].const_data_ptr();
    factor.slot_stride[i] = pool.slot_stride;
    factor.row_stride[i] = pool.row_stride;
    factor.first_row[i] = count == 1 ? slices.offset[i] : 0;
  }
  return factor;
}

Tensor empty_accumulator(const Tensor& like, DType dtype, std::vector<int64_t> sizes) {
  const auto type = dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  return torch::stable::new_empty(like, sizes, type);
}

}  // namespace lora_ext
