// A batch from host memory into the plan, in one call: checked, converted to int32 and planned. For
// one batch after another the host's time is what counts: it is a C function for Python's ctypes,
// not an operator, because torch's dispatcher takes longer than all of its work. The kernel reads
// the converted batch from pinned memory: a copy would be a call more for the host, and a step more
// for the device.
#include <algorithm>
#include <cstdint>
#include <exception>
#include <string>

#include "ops/dispatch.h"

namespace lora_ext {
namespace {

// Whole numbers of a caller: int64, int32 or, with one byte each, uint8.
struct HostInts {
  const void* data;
  int bytes;
};

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

template <typename Stage>
bool with_values(const HostInts& values, Stage&& stage) {
  return values.bytes == 8   ? stage(static_cast<const int64_t*>(values.data))
         : values.bytes == 4 ? stage(static_cast<const int32_t*>(values.data))
                             : stage(static_cast<const uint8_t*>(values.data));
}

// What went wrong in this thread's last call.
std::string& last_error() {
  thread_local std::string text;
  return text;
}

void run(PlanParams& params, int device) {
  if (device < 0) {
    cpu::plan_batch(params);
    return;
  }
#ifdef LORA_EXT_CUDA
  const torch::stable::accelerator::DeviceGuard guard(device);
  params.stream = current_stream(device);
  check_launch("LoRABatch.update", cuda::plan_batch_from_host(params));
#else
  check(false, "this build of lora_ext has CPU kernels only, but the plan is on device ", device,
        "; build it where nvcc is found");
#endif
}

}  // namespace
}  // namespace lora_ext

// Plans `n` requests, tokens where `segments` is null, for the plan of `capacity` tokens and
// `num_slots` slots on CUDA device `device` (-1: on the CPU). `slots` and `segments` (lengths, or
// with `by_length` 0 the n + 1 starts) have elements of 1, 4 or 8 bytes. `host` takes what the
// device reads, 2 n + 1 elements with segments and n without; it must stay as it is until then.
// Returns twice the number of tokens, plus 1 where some token has an adapter; -1 where the batch is
// not one for this plan, or has more than `max_tokens` tokens, and -2 where the launch failed:
// nothing was planned.
extern "C" __attribute__((visibility("default"))) int64_t
lora_ext_update_plan(int32_t* plan, int64_t capacity, int64_t num_slots, int64_t max_tokens,
                     int device, int32_t* host, int64_t n, const void* slots, int slot_bytes,
                     const void* segments, int segment_bytes, int by_length) {
  using namespace lora_ext;
  bool any_adapter = false;
  bool good = with_values({slots, slot_bytes}, [&](auto* values) {
    return stage_slots(values, n, num_slots, host, any_adapter);
  });
  int64_t num_tokens = n;
  if (segments != nullptr) {
    good &= with_values({segments, segment_bytes}, [&](auto* values) {
      return by_length != 0 ? stage_lens(values, n, max_tokens, host + n)
                            : stage_indptr(values, n, max_tokens, host + n);
    });
    num_tokens = host[2 * n];
  }
  if (!good || num_tokens > max_tokens) {
    return -1;
  }
  PlanParams params{};
  params.slots = host;
  params.seg_indptr = segments != nullptr ? host + n : nullptr;
  params.n = n;
  params.plan = plan_view(plan, capacity, num_slots);
  try {
    run(params, device);
  } catch (const std::exception& error) {
    last_error() = error.what();
    return -2;
  }
  return 2 * num_tokens + (any_adapter && num_tokens > 0 ? 1 : 0);
}

extern "C" __attribute__((visibility("default"))) const char* lora_ext_last_error() {
  return lora_ext::last_error().c_str();
}
