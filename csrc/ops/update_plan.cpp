// update_plan_: a batch from host memory into the plan, in one call: checked, converted to int32
// and planned. For one batch after another the host's time is what counts, and each call of torch
// would cost more than the work. The kernel reads the converted batch from pinned memory: a copy
// would be a call more for the host, and a step more for the device.
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "ops/dispatch.h"

namespace lora_ext {
namespace {

using torch::headeronly::ScalarType;

#ifdef LORA_EXT_CUDA
constexpr auto kFromHost = cuda::plan_batch_from_host;
#else
constexpr int (*kFromHost)(const PlanParams&) = nullptr;
#endif

// The loops below have no exit and compare nothing that is 64 bits wide, so that they vectorise:
// the bits that a good value must not have are collected, and looked at behind the loop.

// Slots in [-1, num_slots).
template <typename T>
bool stage_slots(const T* slots, int64_t n, int64_t num_slots, int32_t* out, bool& any_adapter) {
  uint64_t bits = 0;
  int32_t highest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t next = static_cast<uint64_t>(int64_t{slots[i]}) + 1;
    bits |= next;
    highest = std::max(highest, static_cast<int32_t>(next));
    out[i] = static_cast<int32_t>(next) - 1;
  }
  any_adapter = highest > 0;
  return bits >> 31 == 0 && highest <= num_slots;
}

// Lengths to where each segment starts, and the end of the last one.
template <typename T>
bool stage_lens(const T* lens, int64_t n, int64_t max_tokens, int32_t* out) {
  uint64_t bits = 0, end = 0;  // good lengths add up to less than 2^63
  out[0] = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto length = static_cast<uint64_t>(int64_t{lens[i]});
    bits |= length;
    end += length;
    out[i + 1] = static_cast<int32_t>(end);
  }
  return bits >> 31 == 0 && end <= static_cast<uint64_t>(max_tokens);
}

template <typename T>
bool stage_indptr(const T* indptr, int64_t n, int64_t max_tokens, int32_t* out) {
  uint64_t bits = 0;  // no value and no step may be negative
  for (int64_t i = 0; i < n; ++i) {
    const auto next = static_cast<uint64_t>(int64_t{indptr[i + 1]});
    bits |= next | (next - static_cast<uint64_t>(int64_t{indptr[i]}));
    out[i] = static_cast<int32_t>(indptr[i]);
  }
  out[n] = static_cast<int32_t>(indptr[n]);
  return bits >> 63 == 0 && indptr[0] == 0 && indptr[n] <= max_tokens;
}

// Calls stage(data) with the values of a host tensor of at least n elements.
template <typename Stage>
bool with_values(const char* name, const Tensor& values, int64_t n, Stage&& stage) {
  const ScalarType type = values.scalar_type();
  check(values.is_cpu() && values.dim() == 1 && values.is_contiguous() && values.numel() >= n &&
            (type == ScalarType::Long || type == ScalarType::Int || type == ScalarType::Byte),
        name, " must be a contiguous 1-D int32, int64 or uint8 tensor of at least ", n,
        " elements on the CPU, got ", describe(values));
  const void* const data = values.const_data_ptr();
  return type == ScalarType::Long  ? stage(static_cast<const int64_t*>(data))
         : type == ScalarType::Int ? stage(static_cast<const int32_t*>(data))
                                   : stage(static_cast<const uint8_t*>(data));
}

std::tuple<int64_t, bool> update_plan_(const Tensor plan, const Tensor host, const Tensor slots,
                                       const OptionalTensor seg_lens,
                                       const OptionalTensor seg_indptr, int64_t n,
                                       int64_t num_slots, int64_t max_tokens) {
  check(!seg_lens.has_value() || !seg_indptr.has_value(), "give seg_lens or seg_indptr, not both");
  int32_vector("plan", plan, plan);
  int32_vector("host", host, host);
  const int64_t capacity = plan_max_tokens(plan.numel(), num_slots);
  check(num_slots >= 0 && capacity >= 0, "plan has ", plan.numel(),
        " elements, which is no plan_size(max_tokens, num_slots) for ", num_slots, " slots");
  check(max_tokens <= capacity, "max_tokens is ", max_tokens, ", the plan has room for ", capacity);
  const bool per_segment = seg_lens.has_value() || seg_indptr.has_value();
  const int64_t elements = per_segment ? 2 * n + 1 : n;
  check(n >= 0 && host.is_cpu() && host.numel() >= elements, "host is ", describe(host), ", ", n,
        " requests need int32 [", elements, "] on the CPU");

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

  PlanParams params{};
  params.slots = to;
  params.seg_indptr = per_segment ? to + n : nullptr;
  params.n = n;
  params.plan = plan_view(static_cast<int32_t*>(plan.mutable_data_ptr()), capacity, num_slots);
  launch("update_plan_", plan, params, cpu::plan_batch, kFromHost);
  return {num_tokens, any_adapter && num_tokens > 0};
}

}  // namespace

LORA_EXT_IMPL(update_plan_, update_plan_)

}  // namespace lora_ext
