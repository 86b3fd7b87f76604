// From an op to its kernel: the device of the tensors picks the CPU or the CUDA one.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "cpu/kernels.h"
#include "ops/arguments.h"

#ifdef LORA_EXT_CUDA
#include "kernels/kernels.h"
#define LORA_EXT_KERNEL(name) ::lora_ext::cpu::name, ::lora_ext::cuda::name
#else
#define LORA_EXT_KERNEL(name) ::lora_ext::cpu::name, nullptr
#endif

// One function serves both dispatch keys.
#define LORA_EXT_IMPL(op, function)                                                  \
  STABLE_TORCH_LIBRARY_IMPL(lora_ext, CPU, m) { m.impl(#op, TORCH_BOX(&function)); } \
  STABLE_TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) { m.impl(#op, TORCH_BOX(&function)); }

namespace lora_ext {

// torch's current stream on a CUDA device.
void* current_stream(int device);
// Throws with the CUDA error's text where `error` is not 0.
void check_launch(const char* op, int error);

// Keeps a parameter's type from being deduced from its argument, which may be a plain nullptr here.
template <typename T>
struct NotDeduced {
  using type = T;
};

// Runs `params` on the device of `like`, which becomes the current one meanwhile.
template <typename Params>
void launch(const char* op, const Tensor& like, Params& params,
            typename NotDeduced<void (*)(const Params&)>::type cpu_kernel,
            typename NotDeduced<int (*)(const Params&)>::type cuda_kernel) {
  if (like.is_cpu()) {
    cpu_kernel(params);
    return;
  }
  check(cuda_kernel != nullptr, op,
        ": this build of lora_ext has CPU kernels only, but the tensors are on ", describe(like),
        "; build it where nvcc is found");
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  params.stream = current_stream(like.get_device_index());
  check_launch(op, cuda_kernel(params));
}

}  // namespace lora_ext
