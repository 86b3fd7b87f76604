// moe_lora_apply_: a shrink into the workspace and an expand from it, the second one launched while
// the first is at work, or one kernel for the smallest batches; and the same for fp32 by plain
// loops.
//
// What moves is the weights of every (slot, expert) in the batch, mostly for a few pairs each, so
// both kernels are streams of weights: a CTA has all of its loads in flight at once, many CTAs are
// resident, and no CTA waits for another one: where K is split, the expand adds up the parts.
#include "common/vec.cuh"
#include "kernels/kernels.h"
#include "kernels/moe_apply.h"
#include "kernels/wide_apply.h"

namespace lora_ext::cuda {
namespace {

MoeShrinkConfig shrink_config_of(const MoeApplyParams& p) {
  if (p.dtype == DType::kFloat32) {
    return {1, 1, 1, static_cast<int>(p.in_features)};
  }
  MoeShape shape{};
  shape.num_pairs = p.num_pairs;
  shape.num_groups = moe_groups(p);
  // CTAs share a part of K where there are clusters, and the products by wgmma that know of it.
  shape.num_experts = has_wgmma() ? p.num_experts : shape.num_groups;
  shape.in_features = p.in_features;
  // The slices of a packed A are one matrix.
  shape.matrices = p.a.rows_by_rank ? 1 : p.slices.count;
  shape.rows = p.max_rank * (p.a.rows_by_rank ? p.slices.count : 1);
  shape.max_rank = p.max_rank;
  shape.vector = moe_shrink_is_vector(p);
  shape.sm_count = device_properties().sm_count;
  return moe_shrink_config(shape);
}

__device__ __forceinline__ int tile_rank(const MoeApplyParams& p, const MoeTile& tile) {
  return is_valid(tile, p.num_slots, p.num_experts) ? min(p.ranks[tile.slot], p.max_rank) : 0;
}

__device__ float topk_weight(const MoeApplyParams& p, int pair) {
  return p.topk_weights != nullptr ? static_cast<const float*>(p.topk_weights)[pair] : 1.0f;
}

// A warp computes one element of the intermediate at a time.
__global__ void __launch_bounds__(kMoeThreads)
    moe_shrink_float_kernel(const __grid_constant__ MoeApplyParams p, MoeRouting routing,
                            MoeWorkspace at) {
  const int lane = threadIdx.x % 32, row = blockIdx.x * kMoeWarps + threadIdx.x / 32;
  const int slice = row / p.max_rank, j = row % p.max_rank;
  if (slice >= p.slices.count) {
    return;
  }
  const int32_t* permutation = routing.permutation();
  for (int index = blockIdx.y; index < routing.num_tiles(); index += gridDim.y) {
    const MoeTile tile = routing.tile(index);
    const int rank = tile_rank(p, tile);
    if (j >= rank) {
      continue;
    }
    const float* a = static_cast<const float*>(p.a.base[slice]) +
                     p.a.row_offset(tile.slot, tile.expert, slice, rank, j);
    for (int i = tile.start; i < tile.start + tile.count; ++i) {
      const int pair = permutation[i];
      if (pair >= p.num_pairs) {
        continue;
      }
      const float* x = static_cast<const float*>(p.x) + pair / p.x_divisor * p.x_stride;
      float sum = 0.0f;
      for (int64_t k = lane; k < p.in_features; k += 32) {
        sum = fmaf(x[k], a[k], sum);
      }
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      }
      if (lane == 0) {
        static_cast<float*>(p.workspace)[pair * at.row_stride + slice * at.rank_stride + j] =
            sum * p.scalings[tile.slot] * topk_weight(p, pair);
      }
    }
  }
}

// A thread computes one column of y for all pairs of a tile.
template <typename Y>
__global__ void __launch_bounds__(kMoeThreads)
    moe_expand_float_kernel(const __grid_constant__ MoeApplyParams p, MoeRouting routing,
                            MoeWorkspace at) {
  const int column = blockIdx.x * kMoeThreads + threadIdx.x;
  if (column >= p.slices.offset[p.slices.count]) {
    return;
  }
  int slice = 0;
  while (column >= p.slices.offset[slice + 1]) {
    ++slice;
  }
  const int n = column - p.slices.offset[slice];
  const int32_t* permutation = routing.permutation();
  for (int index = blockIdx.y; index < routing.num_tiles(); index += gridDim.y) {
    const MoeTile tile = routing.tile(index);
    const int rank = tile_rank(p, tile);
    if (rank <= 0) {
      continue;
    }
    const float* b = static_cast<const float*>(p.b.base[slice]) +
                     p.b.row_offset(tile.slot, tile.expert, slice, rank, n);
    for (int i = tile.start; i < tile.start + tile.count; ++i) {
      const int pair = permutation[i];
      if (pair >= p.num_pairs) {
        continue;
      }
      const float* xa =
          static_cast<const float*>(p.workspace) + pair * at.row_stride + slice * at.rank_stride;
      float sum = 0.0f;
      for (int j = 0; j < rank; ++j) {
        sum = fmaf(xa[j], b[j], sum);
      }
      Y* y = static_cast<Y*>(p.y) + pair * p.y_stride + p.column_start[slice] + n * p.column_stride;
      *y = device::from_float<Y>(device::to_float(*y) + sum);
    }
  }
}

cudaError_t apply_float(const MoeApplyParams& p) {
  const MoeRouting routing = moe_routing(p);
  const MoeWorkspace at(p, 1);
  const auto stream = static_cast<cudaStream_t>(p.stream);
  const int sm_count = device_properties().sm_count;
  const auto grid = [&](int64_t blocks) {
    return dim3(static_cast<unsigned>(blocks),
                static_cast<unsigned>(moe_grid_tiles(p.num_pairs, moe_groups(p),
                                                     static_cast<int>(blocks), sm_count)));
  };
  moe_shrink_float_kernel<<<grid(ceil_div(p.slices.count * p.max_rank, kMoeWarps)), kMoeThreads, 0,
                            stream>>>(p, routing, at);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    return error;
  }
  const dim3 columns = grid(ceil_div(p.slices.offset[p.slices.count], kMoeThreads));
  switch (p.y_dtype) {
    case DType::kFloat32:
      moe_expand_float_kernel<float><<<columns, kMoeThreads, 0, stream>>>(p, routing, at);
      break;
    case DType::kBFloat16:
      moe_expand_float_kernel<__nv_bfloat16><<<columns, kMoeThreads, 0, stream>>>(p, routing, at);
      break;
    default:
      moe_expand_float_kernel<__half><<<columns, kMoeThreads, 0, stream>>>(p, routing, at);
  }
  return cudaGetLastError();
}

}  // namespace

int64_t moe_apply_workspace(const MoeApplyParams& p) {
  if (p.dtype != DType::kFloat32 && moe_takes_joint(p)) {
    return 0;
  }
  return MoeWorkspace(p, shrink_config_of(p).splits).bytes();
}

int moe_apply(const MoeApplyParams& p) {
  if (p.dtype == DType::kFloat32) {
    return apply_float(p);
  }
  if (moe_takes_joint(p)) {
    return moe_joint(p);
  }
  const MoeShrinkConfig config = shrink_config_of(p);
  const cudaError_t error = moe_shrink(p, config);
  return error != cudaSuccess ? error : moe_expand(p, config);
}

}  // namespace lora_ext::cuda
