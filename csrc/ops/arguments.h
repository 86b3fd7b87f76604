// From tensors to the structs that kernels take, with the checks that all ops share.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/params.h"

namespace lora_ext {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

// "bfloat16 [4, 64] on cuda:0", for messages.
std::string describe(const Tensor& tensor);

// The dtype of a floating tensor that the kernels know (fp64 on the CPU only).
DType float_dtype(const char* name, const Tensor& tensor);

// A 1-D contiguous int32 (int64, fp32) tensor on the device of `like`.
const int32_t* int32_vector(const char* name, const Tensor& tensor, const Tensor& like);
const int64_t* int64_vector(const char* name, const Tensor& tensor, const Tensor& like);
const float* float_vector(const char* name, const Tensor& tensor, const Tensor& like);

// What a module's adapters have in common: ranks [L], scalings [L], and the plan of the batch.
struct Slots {
  const int32_t* ranks;
  int64_t num_slots;
  PlanView plan;
};
Slots slots_of(const Tensor& ranks, const Tensor& plan, const Tensor& like);
const float* scalings_of(const Tensor& scalings, const Slots& slots, const Tensor& like);

// A row-major matrix [T, at least `columns`] whose rows may be strided; T must fit the plan.
struct Matrix {
  const void* data;
  int64_t rows, columns, stride;
  DType dtype;
};
Matrix matrix_of(const char* name, const Tensor& tensor);
void check_tokens(const char* name, int64_t num_tokens, const PlanView& plan);

int32_t checked_rank(int64_t max_rank);
Slices slices_of(const std::vector<int64_t>& output_slices);

// A and B in any of the three layouts: one packed tensor, one tensor per slice, or one flat buffer
// with offsets.
Factor factor_a(const Tensors& lora_a, const OptionalTensor& offsets, int64_t num_slices,
                int64_t max_rank, int64_t in_features, DType dtype, const Slots& slots,
                const Tensor& like);
Factor factor_b(const Tensors& lora_b, const OptionalTensor& offsets, const Slices& slices,
                int64_t max_rank, DType dtype, const Slots& slots, const Tensor& like);

// fp32 (fp64) scratch or result on the device of `like`.
Tensor empty_accumulator(const Tensor& like, DType dtype, std::vector<int64_t> sizes);

}  // namespace lora_ext
