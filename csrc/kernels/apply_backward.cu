// Gradients of lora_apply, one kernel each: g = scaling dy B for tiles of tokens, from it dx = g A,
// and for each slot dA = g^T x and dB = dy^T xa over the slot's tokens, which the plan's
// permutation lists one behind the other.
//
// A CTA owns a block of 64 x 64 of one result and walks what there is to sum in order (see
// tile_product.cuh). Long sums are shared by the CTAs of a cluster, whose parts meet in distributed
// shared memory in fixed order: no atomics, and no partial results in global memory.
#include "kernels/heuristics.h"
#include "kernels/kernels.h"
#include "kernels/launch.cuh"
#include "kernels/tile_product.cuh"

namespace lora_ext::cuda {
namespace {

// The part of `terms` that a member of a cluster sums. Only the device knows how many tokens a slot
// has: a cluster uses as many members as there is work for, and the others have nothing to do.
struct Share {
  static constexpr int kLeastSteps = 4;
  int members, member, begin, end;

  __device__ Share(int terms, int cluster) {
    const int steps = (terms + kProductStep - 1) / kProductStep;
    members = max(1, min(cluster, steps / kLeastSteps));
    while ((members & (members - 1)) != 0) {
      members &= members - 1;  // a power of two: members share 64 x 64 elements evenly
    }
    member = static_cast<int>(blockIdx.x % cluster);
    begin = static_cast<int>(int64_t{steps} * member / members) * kProductStep;
    end = min(terms, static_cast<int>(int64_t{steps} * (member + 1) / members) * kProductStep);
  }
  __device__ bool is_idle() const { return member >= members; }
};

__device__ __forceinline__ int rank_of(const ApplyParams& p, int slot) {
  return min(p.ranks[slot], p.max_rank);
}
__device__ __forceinline__ int64_t intermediate_stride(const ApplyParams& p) {
  return int64_t{p.slices.count} * p.max_rank;
}
__device__ __forceinline__ const void* advance(const void* base, int64_t elements, DType dtype) {
  return static_cast<const char*>(base) + elements * (dtype == DType::kFloat32 ? 4 : 2);
}
__device__ __forceinline__ void store_rounded(const void* base, int64_t at, DType dtype,
                                              float value) {
  void* to = const_cast<void*>(base);
  if (dtype == DType::kFloat32) {
    static_cast<float*>(to)[at] = value;
  } else if (dtype == DType::kBFloat16) {
    static_cast<__nv_bfloat16*>(to)[at] = __float2bfloat16_rn(value);
  } else {
    static_cast<__half*>(to)[at] = __float2half_rn(value);
  }
}

// `columns` of a matrix with a row per token, from column `first` on: x, dy, g or xa.
__device__ __forceinline__ Operand rows_of_tokens(const ApplyParams& p, const void* base,
                                                  int64_t stride, DType dtype, int start, int count,
                                                  int64_t first, int columns) {
  return {advance(base, first, dtype),
          stride,
          p.plan.permutation + start,
          count,
          columns,
          p.num_tokens,
          dtype};
}

// Rows of one slice of A or B of a slot, from column `first` on.
__device__ __forceinline__ Operand rows_of_factor(const Factor& factor, DType dtype, int slot,
                                                  int slice, int rank, int rows, int first,
                                                  int columns) {
  return {advance(factor.base[slice], factor.row_offset(slot, slice, rank, 0) + first, dtype),
          factor.stride(slice, rank),
          nullptr,
          rows,
          columns,
          0,
          dtype};
}

// g = scaling * dy B. Grid: (wide tile, member of the cluster), (slice, 64 ranks).
template <bool kExact>
__global__ void __launch_bounds__(kProductThreads, kProductBlocksPerSm)
    down_kernel(const __grid_constant__ ApplyBackwardParams params, int cluster) {
  using Product = TileProduct<true, kExact>;
  __shared__ __align__(16) float shared[Product::kSharedFloats];
  const ApplyParams& p = params.apply;
  const Tile tile = p.plan.wide_tiles[blockIdx.x / cluster];
  if (tile.slot < 0) {
    return;  // the whole cluster alike, here and below
  }
  const int rank = rank_of(p, tile.slot);
  const int rank_blocks = (p.max_rank + kProductColumns - 1) / kProductColumns;
  const int slice = blockIdx.y / rank_blocks;
  const int first = blockIdx.y % rank_blocks * kProductColumns;
  if (first >= rank) {
    return;
  }
  const int columns = min(kProductColumns, rank - first);
  const int width = p.slices.offset[slice + 1] - p.slices.offset[slice];
  const Share share(width, cluster);
  if (share.is_idle()) {
    return;
  }
  Product product(shared);
  product.add(rows_of_tokens(p, p.y, p.y_stride, p.y_dtype, tile.start, tile.count,
                             p.slices.offset[slice], width),
              rows_of_factor(p.b, p.dtype, tile.slot, slice, rank, width, first, columns),
              share.begin, share.end);
  const float scaling = p.scalings[tile.slot];
  float* g = static_cast<float*>(params.g) + int64_t{slice} * rank + first;
  product.finish(share.members, share.member, tile.count, columns, false,
                 [&](int m, int n, float sum) {
                   const int64_t token = p.plan.permutation[tile.start + m];
                   if (token < p.num_tokens) {
                     g[token * intermediate_stride(p) + n] = scaling * sum;
                   }
                 });
}

// dx = g A. Grid: (wide tile, 64 columns of x).
template <bool kExact>
__global__ void __launch_bounds__(kProductThreads, kProductBlocksPerSm)
    input_kernel(const __grid_constant__ ApplyBackwardParams params, unsigned blocks_per_tile) {
  using Product = TileProduct<true, kExact>;
  __shared__ __align__(16) float shared[Product::kSharedFloats];
  const ApplyParams& p = params.apply;
  const Tile tile = p.plan.wide_tiles[blockIdx.x / blocks_per_tile];
  const int rank = tile.slot < 0 ? 0 : rank_of(p, tile.slot);
  if (rank <= 0) {
    return;
  }
  const int first = static_cast<int>(blockIdx.x % blocks_per_tile) * kProductColumns;
  const int columns = min(kProductColumns, static_cast<int>(p.in_features) - first);
  Product product(shared);
  for (int slice = 0; slice < p.slices.count; ++slice) {
    product.add(rows_of_tokens(p, params.g, intermediate_stride(p), DType::kFloat32, tile.start,
                               tile.count, int64_t{slice} * rank, rank),
                rows_of_factor(p.a, p.dtype, tile.slot, slice, rank, rank, first, columns), 0,
                rank);
  }
  product.finish(1, 0, tile.count, columns, false, [&](int m, int n, float sum) {
    const int64_t token = p.plan.permutation[tile.start + m];
    if (token < p.num_tokens) {
      store_rounded(params.dx, token * p.in_features + first + n, p.dtype, sum);
    }
  });
}

// dA = sum of g^T x over a slot's tokens. Grid: (64 columns of x, member), slot, 64 rows of A.
template <bool kExact>
__global__ void __launch_bounds__(kProductThreads, kProductBlocksPerSm)
    weight_a_kernel(const __grid_constant__ ApplyBackwardParams params, int cluster) {
  using Product = TileProduct<false, kExact>;
  __shared__ __align__(16) float shared[Product::kSharedFloats];
  const ApplyParams& p = params.apply;
  const int slot = blockIdx.y;
  const int start = p.plan.slot_indptr[slot], count = p.plan.slot_indptr[slot + 1] - start;
  const int rank = rank_of(p, slot), first = blockIdx.z * kProductColumns;
  if (count == 0 || first >= rank * p.slices.count) {
    return;
  }
  const Share share(count, cluster);
  if (share.is_idle()) {
    return;
  }
  const int columns = min(kProductColumns, rank * p.slices.count - first);
  const int feature = static_cast<int>(blockIdx.x / cluster) * kProductRows;
  const int features = min(kProductRows, static_cast<int>(p.in_features) - feature);
  Product product(shared);
  product.add(rows_of_tokens(p, p.x, p.x_stride, p.dtype, start, count, feature, features),
              rows_of_tokens(p, params.g, intermediate_stride(p), DType::kFloat32, start, count,
                             first, columns),
              share.begin, share.end);
  product.finish(
      share.members, share.member, features, columns, true, [&](int m, int n, float sum) {
        const int slice = (first + n) / rank, row = (first + n) % rank;
        store_rounded(params.da.base[slice],
                      params.da.row_offset(slot, slice, rank, row) + feature + m, p.dtype, sum);
      });
}

// dB = sum of dy^T xa over a slot's tokens. Grid: (64 rows of B, member), slot, 64 ranks.
template <bool kExact>
__global__ void __launch_bounds__(kProductThreads, kProductBlocksPerSm)
    weight_b_kernel(const __grid_constant__ ApplyBackwardParams params, int cluster) {
  using Product = TileProduct<false, kExact>;
  __shared__ __align__(16) float shared[Product::kSharedFloats];
  const ApplyParams& p = params.apply;
  const int slot = blockIdx.y;
  const int start = p.plan.slot_indptr[slot], count = p.plan.slot_indptr[slot + 1] - start;
  const int rank = rank_of(p, slot), first = blockIdx.z * kProductColumns;
  if (count == 0 || first >= rank) {
    return;
  }
  const Share share(count, cluster);
  if (share.is_idle()) {
    return;
  }
  int slice = 0, block = static_cast<int>(blockIdx.x / cluster);
  for (; slice < p.slices.count - 1; ++slice) {
    const int width = p.slices.offset[slice + 1] - p.slices.offset[slice];
    const int blocks = (width + kProductRows - 1) / kProductRows;
    if (block < blocks) {
      break;
    }
    block -= blocks;
  }
  const int columns = min(kProductColumns, rank - first), row = block * kProductRows;
  const int rows = min(kProductRows, p.slices.offset[slice + 1] - p.slices.offset[slice] - row);
  Product product(shared);
  product.add(rows_of_tokens(p, p.y, p.y_stride, p.y_dtype, start, count,
                             p.slices.offset[slice] + row, rows),
              rows_of_tokens(p, p.workspace, intermediate_stride(p), DType::kFloat32, start, count,
                             int64_t{slice} * rank + first, columns),
              share.begin, share.end);
  product.finish(share.members, share.member, rows, columns, false, [&](int m, int n, float sum) {
    store_rounded(params.db.base[slice],
                  params.db.row_offset(slot, slice, rank, row + m) + first + n, p.dtype, sum);
  });
}

unsigned blocks_of(int64_t elements) {
  return static_cast<unsigned>(ceil_div(elements, kProductRows));
}

// Of the plan, not of the call, which may have only the first of the plan's tokens: their tiles can
// be anywhere in the list.
unsigned num_tiles(const ApplyParams& p) {
  return static_cast<unsigned>(max_tiles(p.plan.max_tokens, p.plan.num_slots, kWideTileTokens));
}

// `cluster` CTAs for each of the blocks; the kernel is told what follows its params.
template <typename... Params, typename... Args>
cudaError_t launch_product(void (*kernel)(Params...), const ApplyBackwardParams& params,
                           dim3 blocks, int cluster, Args... args) {
  blocks.x *= cluster;
  const LaunchShape shape{blocks, kProductThreads, 0, cluster, false};
  return launch_kernel(kernel, shape, params.stream, params, args...);
}

template <bool kExact>
cudaError_t launch_down(const ApplyBackwardParams& params) {
  const ApplyParams& p = params.apply;
  const DeviceProperties device = device_properties();
  const dim3 blocks(num_tiles(p), p.slices.count * blocks_of(p.max_rank));
  const int64_t likely = likely_tiles(p.num_tokens, p.plan.num_slots, kWideTileTokens) * blocks.y;
  const int64_t mean_width = p.slices.offset[p.slices.count] / p.slices.count;
  const int cluster = gradient_cluster(likely, ceil_div(mean_width, kProductStep), device.sm_count,
                                       device.clusters);
  return launch_product(down_kernel<kExact>, params, blocks, cluster, cluster);
}

template <bool kExact>
cudaError_t launch_input(const ApplyBackwardParams& params) {
  const unsigned blocks_per_tile = blocks_of(params.apply.in_features);
  const dim3 blocks(num_tiles(params.apply) * blocks_per_tile);
  return launch_product(input_kernel<kExact>, params, blocks, 1, blocks_per_tile);
}

// The longest sum decides, all tokens in one slot: where they are spread out, a cluster's spare
// members leave at once.
int weight_cluster(const ApplyParams& p, const dim3& blocks) {
  const DeviceProperties device = device_properties();
  return gradient_cluster(int64_t{blocks.x} * blocks.z, ceil_div(p.num_tokens, kProductStep),
                          device.sm_count, device.clusters);
}

template <bool kExact>
cudaError_t launch_weight_a(const ApplyBackwardParams& params) {
  const ApplyParams& p = params.apply;
  const dim3 blocks(blocks_of(p.in_features), static_cast<unsigned>(p.plan.num_slots),
                    blocks_of(int64_t{p.slices.count} * p.max_rank));
  const int cluster = weight_cluster(p, blocks);
  return launch_product(weight_a_kernel<kExact>, params, blocks, cluster, cluster);
}

template <bool kExact>
cudaError_t launch_weight_b(const ApplyBackwardParams& params) {
  const ApplyParams& p = params.apply;
  dim3 blocks(0, static_cast<unsigned>(p.plan.num_slots), blocks_of(p.max_rank));
  for (int i = 0; i < p.slices.count; ++i) {
    blocks.x += blocks_of(p.slices.offset[i + 1] - p.slices.offset[i]);
  }
  const int cluster = weight_cluster(p, blocks);
  return launch_product(weight_b_kernel<kExact>, params, blocks, cluster, cluster);
}

cudaError_t recompute_xa(const ApplyBackwardParams& params) {
  ShrinkParams xa = shrink_of(params.apply);
  xa.stream = params.stream;
  return static_cast<cudaError_t>(shrink(xa));
}

template <bool kExact>
cudaError_t run(const ApplyBackwardParams& params) {
  cudaError_t error = cudaSuccess;
  const auto queue = [&](bool wanted, cudaError_t (*launch)(const ApplyBackwardParams&)) {
    if (wanted && error == cudaSuccess) {
      error = launch(params);
    }
  };
  queue(params.dx != nullptr || params.wants_da, launch_down<kExact>);
  queue(params.dx != nullptr, launch_input<kExact>);
  queue(params.wants_da, launch_weight_a<kExact>);
  queue(params.wants_db, recompute_xa);
  queue(params.wants_db, launch_weight_b<kExact>);
  return error;
}

}  // namespace

int apply_backward(const ApplyBackwardParams& params) {
  return params.apply.dtype == DType::kFloat32 ? run<true>(params) : run<false>(params);
}

}  // namespace lora_ext::cuda
