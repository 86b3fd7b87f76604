// Token -> adapter map and enabled flags for MoE layers, in one launch.
//
// Every token of the output finds its own segment by bisection, so that no choice of segments or
// launch size can leave an entry unwritten; segments only raise flags, and each flag has one owner:
// the thread of its slot.
#include <cuda_runtime.h>

#include "common/ptx.cuh"
#include "kernels/kernels.h"
#include "kernels/launch.cuh"

namespace lora_ext::cuda {
namespace {

constexpr int kThreads = 256;

__device__ int effective_slot(const MoeInfoParams& p, int slot) {
  return slot >= 0 && slot < p.num_slots && p.ranks[slot] > 0 ? slot : -1;
}

__global__ void __launch_bounds__(kThreads) moe_info_kernel(MoeInfoParams p) {
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  device::grid_dependency_launch();
  device::grid_dependency_wait();
  for (int64_t t = first; t < p.num_tokens; t += step) {
    int64_t low = 0, high = p.num_segments;  // the first segment that ends behind t
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (p.seg_indptr[middle + 1] <= t) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    p.token_slots[t] = low < p.num_segments ? effective_slot(p, p.seg_slots[low]) : -1;
  }
  for (int64_t slot = first / 32; slot < p.num_slots; slot += step / 32) {
    bool used = false;
    if (p.ranks[slot] > 0) {
      for (int64_t i = threadIdx.x % 32; i < p.num_segments; i += 32) {
        used |= p.seg_slots[i] == slot && p.seg_indptr[i + 1] > p.seg_indptr[i] &&
                p.seg_indptr[i] < p.num_tokens;
      }
    }
    used = __any_sync(0xffffffffu, used);
    if (threadIdx.x % 32 == 0) {
      p.enabled[slot] = used;
    }
  }
}

}  // namespace

int moe_info(const MoeInfoParams& params) {
  const int64_t threads = max(params.num_tokens, 32 * params.num_slots);
  const int64_t blocks = min(max((threads + kThreads - 1) / kThreads, int64_t{1}), int64_t{1024});
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(blocks));
  shape.threads = kThreads;
  shape.cluster = 1;
  shape.dependent = true;
  return launch_kernel(moe_info_kernel, shape, params.stream, params);
}

}  // namespace lora_ext::cuda
