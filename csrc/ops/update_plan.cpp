// update_plan_: a batch from host memory into the plan, in one call: checked, converted to int32,
// staged, copied and planned. For one batch after another the host's time is what counts, and each
// call of torch would cost more than the work.
#include "kernels/update_plan.h"

#include <torch/headeronly/core/ScalarType.h>

#include <limits>
#include <tuple>

#include "ops/dispatch.h"

namespace lora_ext {
namespace {

using torch::headeronly::ScalarType;

#ifdef LORA_EXT_CUDA
constexpr auto kUpdate = cuda::update_plan;
#else
constexpr int (*kUpdate)(const UpdateParams&) = nullptr;
#endif

void update_on_cpu(const UpdateParams& params) { cpu::plan_batch(params.plan); }

// Slots in [-1, num_slots) to `out`. The loops below have no exit, so that they vectorise.
template <typename T>
bool stage_slots(const T* slots, int64_t n, int64_t num_slots, int32_t* out, bool& any_adapter) {
  const auto limit = static_cast<uint32_t>(num_slots);
  bool good = true, any = false;
  for (int64_t i = 0; i < n; ++i) {
    const auto slot = static_cast<int32_t>(slots[i]);
    good &= slot == slots[i] && static_cast<uint32_t>(slot) + 1 <= limit;
    any |= slot >= 0;
    out[i] = slot;
  }
  any_adapter = any;
  return good;
}

// Lengths to where each segment starts, and the end of the last one.
template <typename T>
bool stage_lens(const T* lens, int64_t n, int64_t max_tokens, int32_t* out) {
  bool good = true;
  uint64_t end = 0;  // n lengths that are good add up to less than 2^63
  out[0] = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto length = static_cast<uint64_t>(lens[i]);
    good &= length <= static_cast<uint64_t>(max_tokens);
    end += length;
    out[i + 1] = static_cast<int32_t>(end);
  }
  return good && end <= static_cast<uint64_t>(max_tokens);
}

template <typename T>
bool stage_indptr(const T* indptr, int64_t n, int64_t max_tokens, int32_t* out) {
  bool good = indptr[0] == 0 && indptr[n] <= max_tokens;
  out[0] = 0;
  for (int64_t i = 0; i < n; ++i) {
    good &= indptr[i + 1] >= indptr[i];
    out[i + 1] = static_cast<int32_t>(indptr[i + 1]);
  }
  return good;
}

// Calls stage(data) with the int32 or int64 values of a host tensor of at least n elements.
template <typename Stage>
bool with_values(const char* name, const Tensor& values, int64_t n, Stage&& stage) {
  const bool is_long = values.scalar_type() == ScalarType::Long;
  check(values.is_cpu() && values.dim() == 1 && values.is_contiguous() && values.numel() >= n &&
            (is_long || values.scalar_type() == ScalarType::Int),
        name, " must be a contiguous 1-D int32 or int64 tensor of at least ", n,
        " elements on the CPU, got ", describe(values));
  return is_long ? stage(static_cast<const int64_t*>(values.const_data_ptr()))
                 : stage(static_cast<const int32_t*>(values.const_data_ptr()));
}

std::tuple<int64_t, bool> update_plan_(const Tensor plan, const Tensor staging, const Tensor host,
                                       const Tensor slots, const OptionalTensor seg_lens,
                                       const OptionalTensor seg_indptr, int64_t n,
                                       int64_t num_slots, int64_t max_tokens) {
  check(!seg_lens.has_value() || !seg_indptr.has_value(), "give seg_lens or seg_indptr, not both");
  int32_vector("plan", plan, plan);
  int32_vector("staging", staging, plan);
  int32_vector("host", host, host);
  const int64_t capacity = plan_max_tokens(plan.numel(), num_slots);
  check(num_slots >= 0 && capacity >= 0, "plan has ", plan.numel(),
        " elements, which is no plan_size(max_tokens, num_slots) for ", num_slots, " slots");
  check(max_tokens <= capacity, "max_tokens is ", max_tokens, ", the plan has room for ", capacity);
  const bool per_segment = seg_lens.has_value() || seg_indptr.has_value();
  const int64_t elements = per_segment ? 2 * n + 1 : n;
  check(n >= 0 && host.is_cpu() && host.numel() >= elements && staging.numel() >= elements,
        "host is ", describe(host), " and staging ", describe(staging), ", ", n,
        " requests need int32 [", elements, "] on the CPU and on the plan's device");

  auto* const to = static_cast<int32_t*>(host.mutable_data_ptr());
  bool any_adapter = false;
  bool good = with_values("slots", slots, n, [&](auto* values) {
    return stage_slots(values, n, num_slots, to, any_adapter);
  });
  int64_t num_tokens = n;
  if (per_segment) {
    const bool by_length = seg_lens.has_value();
    good &= with_values(by_length ? "seg_lens" : "seg_indptr", by_length ? *seg_lens : *seg_indptr,
                        by_length ? n : n + 1, [&](auto* values) {
                          return by_length ? stage_lens(values, n, max_tokens, to + n)
                                           : stage_indptr(values, n, max_tokens, to + n);
                        });
    num_tokens = to[2 * n];
  }
  if (!good || num_tokens > max_tokens) {
    return {-1, false};
  }

  UpdateParams params{};
  params.host = to;
  params.staging = staging.mutable_data_ptr();
  params.bytes = elements * int64_t{sizeof(int32_t)};
  const auto* const from = static_cast<const int32_t*>(params.staging);
  params.plan.slots = from;
  params.plan.seg_indptr = per_segment ? from + n : nullptr;
  params.plan.n = n;
  params.plan.plan = plan_view(static_cast<int32_t*>(plan.mutable_data_ptr()), capacity, num_slots);
  if (plan.is_cpu()) {
    check(params.staging == to, "on the CPU staging and host must be the same memory");
  }
  launch("update_plan_", plan, params, update_on_cpu, kUpdate);
  return {num_tokens, any_adapter && num_tokens > 0};
}

}  // namespace

LORA_EXT_IMPL(update_plan_, update_plan_)

}  // namespace lora_ext
