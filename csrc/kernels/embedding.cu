// Embedding side of LoRA: one column of A per token, gathered and scaled to fp32.
//
// A warp serves one token. With A stored vocabulary-major ([L, V, R] seen as [L, R, V]) its lanes
// read one contiguous run; with the engines' [L, R, V] each rank costs a sector of its own, which
// no order of threads can mend.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "kernels/kernels.h"

namespace lora_ext::cuda {
namespace {

constexpr int kWarps = 4;

template <typename T>
__global__ void __launch_bounds__(32 * kWarps) embedding_kernel(EmbeddingParams p) {
  device::grid_dependency_launch();  // an expand behind it can fetch its weights and y meanwhile
  const int lane = threadIdx.x % 32;
  const int64_t step = int64_t{gridDim.x} * kWarps;
  for (int64_t t = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; t < p.num_tokens; t += step) {
    const int64_t id = (p.ids_are_int64 ? static_cast<const int64_t*>(p.ids)[t]
                                        : static_cast<const int32_t*>(p.ids)[t]) -
                       p.vocab_start;
    const int slot = p.plan.token_slots[t];
    int rank = 0;
    float scaling = 0.0f;
    const T* column = nullptr;
    int64_t stride = 1;
    if (slot >= 0) {
      rank = min(p.ranks[slot], p.max_rank);
      scaling = p.scalings[slot];
      if (id >= 0 && id < p.vocab_size) {
        column = static_cast<const T*>(p.a) + slot * p.a_slot_stride + id * p.a_vocab_stride;
        stride = p.a_rank_stride;
      } else if (id >= p.vocab_size && id - p.vocab_size < p.num_extra) {
        column = static_cast<const T*>(p.extra_a) + slot * p.extra_slot_stride +
                 (id - p.vocab_size) * p.extra_token_stride;
      } else {
        rank = 0;
      }
    }
    float* out = static_cast<float*>(p.xa) + t * p.xa_stride;
    for (int j = lane; j < p.max_rank; j += 32) {
      out[j] = j < rank ? scaling * device::to_float(column[j * stride]) : 0.0f;
    }
  }
}

}  // namespace

int embedding(const EmbeddingParams& params) {
  const auto blocks =
      static_cast<unsigned>(min((params.num_tokens + kWarps - 1) / kWarps, int64_t{1} << 20));
  const auto stream = static_cast<cudaStream_t>(params.stream);
  switch (params.dtype) {
    case DType::kBFloat16:
      embedding_kernel<__nv_bfloat16><<<blocks, 32 * kWarps, 0, stream>>>(params);
      break;
    case DType::kFloat16:
      embedding_kernel<__half><<<blocks, 32 * kWarps, 0, stream>>>(params);
      break;
    default:
      embedding_kernel<float><<<blocks, 32 * kWarps, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

}  // namespace lora_ext::cuda
