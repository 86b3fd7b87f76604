// lora_linear: a base layer and its adapters, y = x W^T + bias + scaling * (x A^T) B^T, in one
// stream of W, or with the shrink beside the base product: both need x alone. lora_fork and
// lora_join_ are for a base layer that is not a plain product: fork, run it, join.
#include <torch/csrc/stable/ops.h>

#include <array>

#include "kernels/apply_halves.h"
#include "kernels/beside.h"
#include "ops/apply.h"
#include "ops/dispatch.h"

namespace lora_ext {
namespace {

// The base product must leave no trace in autograd, which would not see the adapters.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const NoGrad no_grad;
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// [..., K] -> [T, K]
Tensor flattened(const Tensor& x) {
  check(x.dim() >= 1, "x must be [..., features], got ", describe(x));
  if (x.dim() == 2) {
    return x;
  }
  int64_t tokens = 1;
  for (int64_t d = 0; d < x.dim() - 1; ++d) {
    tokens *= x.size(d);
  }
  return torch::stable::reshape(x, {tokens, x.size(x.dim() - 1)});
}

void check_base(const ApplyParams& params, const Tensor& x, const Tensor& weight,
                const OptionalTensor& bias) {
  check(weight.dim() == 2 && weight.size(1) == params.in_features, "weight is ", describe(weight),
        ", expected [N, ", params.in_features, "]");
  check(weight.scalar_type() == x.scalar_type() && weight.is_cuda() == x.is_cuda(), "weight is ",
        describe(weight), ", x is ", describe(x));
  check(weight.size(0) >= output_width(params.slices), "weight has ", weight.size(0),
        " rows, output_slices need ", output_width(params.slices));
  if (bias.has_value()) {
    check(bias->dim() == 1 && bias->size(0) == weight.size(0) &&
              bias->scalar_type() == x.scalar_type() && bias->is_cuda() == x.is_cuda(),
          "bias is ", describe(*bias), ", weight is ", describe(weight));
  }
}

#ifdef LORA_EXT_CUDA
constexpr auto kFork = cuda::apply_fork, kJoin = cuda::apply_join;
#else
constexpr int (*kFork)(const ApplyParams&) = nullptr, (*kJoin)(const ApplyParams&) = nullptr;
#endif

// On the CPU one half comes behind the other, as in an apply.
void shrink_on_cpu(const ApplyParams& params) { cpu::shrink_adapters(shrink_of(params)); }
void expand_on_cpu(const ApplyParams& params) { cpu::expand(expand_of(params)); }

// The workspace is memory of the current stream, which uses it for other things only after it has
// joined. It is there before the base layer, whose temporary memory a capture would hand out again
// while the product, beside which the shrink may begin, is still using it.
Tensor fork(const char* op, ApplyParams& params, const Tensor& x) {
  Tensor workspace = empty_accumulator(x, params.dtype, {workspace_elements(params, x)});
  params.workspace = workspace.mutable_data_ptr();
  if (has_work(params)) {
    launch(op, x, params, shrink_on_cpu, kFork);
  }
  return workspace;
}

Tensor lora_fork(const Tensor x, const Tensors lora_a, const Tensor ranks, const Tensor scalings,
                 const Tensor plan, const std::vector<int64_t> output_slices, int64_t max_rank,
                 const OptionalTensor a_offsets, bool batch_invariant, bool overlap) {
  ApplyParams params = apply_input(x, ranks, scalings, plan, output_slices, max_rank);
  params.batch_invariant = batch_invariant;
  params.overlap = overlap;
  set_a(params, lora_a, a_offsets, x);
  return fork("lora_fork", params, x);
}

void lora_join_(const Tensor y, const Tensor forked, const Tensor x, const Tensors lora_a,
                const Tensors lora_b, const Tensor ranks, const Tensor scalings, const Tensor plan,
                const std::vector<int64_t> output_slices, int64_t max_rank,
                const OptionalTensor a_offsets, const OptionalTensor b_offsets,
                bool batch_invariant, bool overlap) {
  ApplyParams params = apply_params("y", y, x, lora_a, lora_b, ranks, scalings, plan, output_slices,
                                    max_rank, a_offsets, b_offsets);
  params.y = y.mutable_data_ptr();
  params.batch_invariant = batch_invariant;
  params.overlap = overlap;
  const int64_t elements = workspace_elements(params, x);
  check(forked.dim() == 1 && forked.numel() == elements && forked.is_cuda() == x.is_cuda(),
        "forked is ", describe(forked), ", expected what lora_fork returned for these arguments, ",
        elements, " elements");
  params.workspace = forked.mutable_data_ptr();
  if (has_work(params)) {
    launch("lora_join_", x, params, expand_on_cpu, kJoin);
  }
}

// The base product of all of x, [..., N]: flattened it could take another path, to other bits. It
// becomes the output of `params`.
Tensor base_layer(ApplyParams& params, const Tensor& x, const Tensor& rows, const Tensor& weight,
                  const OptionalTensor& bias) {
  Tensor y = linear(x, weight, bias);
  if (!y.is_contiguous()) {
    y = torch::stable::contiguous(y);
  }
  set_y(params, "y", y.dim() == 2 ? y : torch::stable::view(y, {params.num_tokens, weight.size(0)}),
        rows);
  params.y = y.mutable_data_ptr();
  return y;
}

// The adapters' shrink beside the base layer.
Tensor beside(ApplyParams& params, const Tensor& x, const Tensor& rows, const Tensor& weight,
              const OptionalTensor& bias) {
  const Tensor workspace = fork("lora_linear", params, rows);
  std::optional<Tensor> y;
  try {
    y = base_layer(params, x, rows, weight, bias);
  } catch (...) {
#ifdef LORA_EXT_CUDA
    if (x.is_cuda() && has_work(params)) {  // the workspace is freed now
      const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
      cuda::apply_abandon(params);
    }
#endif
    throw;
  }
  if (has_work(params)) {
    launch("lora_linear", rows, params, expand_on_cpu, kJoin);
  }
  return *y;
}

#ifdef LORA_EXT_CUDA
// Base layer and adapters in one stream of the weights; nothing where that is not to be had.
std::optional<Tensor> streamed(const ApplyParams& params, const Tensor& x, const Tensor& weight,
                               const OptionalTensor& bias) {
  LinearParams both{params};
  both.weight = weight.data_ptr();
  both.weight_stride = weight.stride(0);
  both.out_features = weight.size(0);
  if (bias.has_value()) {
    both.bias = bias->data_ptr();
  }
  if (weight.stride(1) != 1 || (bias.has_value() && bias->stride(0) != 1)) {
    return std::nullopt;
  }
  const auto kernel = cuda::linear_wgmma_takes(both)    ? cuda::linear_wgmma
                      : cuda::linear_decode_takes(both) ? cuda::linear_decode
                                                        : nullptr;
  if (kernel == nullptr) {
    return std::nullopt;
  }
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < x.dim() - 1; ++d) {
    sizes.push_back(x.size(d));
  }
  sizes.push_back(both.out_features);
  Tensor y = torch::stable::new_empty(x, sizes);
  both.apply.y = y.mutable_data_ptr();
  both.apply.y_stride = both.out_features;
  both.apply.y_dtype = params.dtype;
  const Tensor workspace = empty_accumulator(x, params.dtype, {cuda::apply_workspace(both.apply)});
  both.apply.workspace = workspace.mutable_data_ptr();
  launch("lora_linear", x, both, nullptr, kernel);
  return y;
}
#endif

Tensor lora_linear(const Tensor x, const Tensor weight, const OptionalTensor bias,
                   const Tensors lora_a, const Tensors lora_b, const Tensor ranks,
                   const Tensor scalings, const Tensor plan,
                   const std::vector<int64_t> output_slices, int64_t max_rank,
                   const OptionalTensor a_offsets, const OptionalTensor b_offsets,
                   bool batch_invariant, bool overlap) {
  const Tensor rows = flattened(x);
  ApplyParams params = apply_input(rows, ranks, scalings, plan, output_slices, max_rank);
  params.batch_invariant = batch_invariant;
  set_a(params, lora_a, a_offsets, rows);
  set_b(params, lora_b, b_offsets, rows);
  check_base(params, rows, weight, bias);
  params.overlap = overlap;
#ifdef LORA_EXT_CUDA
  if (x.is_cuda() && has_work(params) && !overlap) {
    if (const std::optional<Tensor> y = streamed(params, x, weight, bias)) {
      return *y;
    }
  }
#endif
  return beside(params, x, rows, weight, bias);
}

}  // namespace

LORA_EXT_IMPL(lora_linear, lora_linear)
LORA_EXT_IMPL(lora_fork, lora_fork)
LORA_EXT_IMPL(lora_join_, lora_join_)

}  // namespace lora_ext
