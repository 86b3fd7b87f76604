#include <cuda_runtime.h>

#include "kernels/kernels.h"
#include "kernels/update_plan.h"

namespace lora_ext::cuda {

int update_plan(const UpdateParams& p) {
  const cudaError_t error =
      cudaMemcpyAsync(p.staging, p.host, static_cast<size_t>(p.bytes), cudaMemcpyHostToDevice,
                      static_cast<cudaStream_t>(p.stream));
  if (error != cudaSuccess) {
    cudaGetLastError();  // reported here, and must not fail the next launch too
    return error;
  }
  PlanParams plan = p.plan;
  plan.stream = p.stream;
  return plan_batch(plan);
}

}  // namespace lora_ext::cuda
