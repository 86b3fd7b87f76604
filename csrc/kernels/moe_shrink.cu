// xa = weight * scaling * x A^T for tiles of pairs of one (slot, expert): what moves is A.
//
// A CTA of four warps serves one tile, up to 64 rows of A and a part of K. The warps divide K, so
// every weight and every x of the CTA is loaded once, straight from global memory to the tensor
// cores by 16-byte loads: the weights are the 16-row operand of the mma, the pairs its 8-column
// one, and a tile of one pair wastes no weight bandwidth. How many steps of K are in flight depends
// on how many pairs there are: the fewer, the more registers are free for weights. The warps'
// parts are added in shared memory in fixed order; parts of K of different CTAs go to planes of the
// workspace of their own.
#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "kernels/moe_apply.h"

namespace lora_ext::cuda {
namespace {

constexpr int kCachedSlots = kMoeThreads;  // ranks that are fetched before the tile is known

struct ShrinkMatrix {
  const void* a;
  int64_t slot_stride, expert_stride, row_stride;
};
// Only what the kernel reads, the parameter bank being cold at every launch.
struct alignas(64) ShrinkParams {
  MoeRouting routing;
  const int32_t* ranks;
  const float* scalings;
  const void *x, *topk_weights;
  float* xa;
  int64_t x_stride, xa_row_stride, xa_plane;
  int32_t x_divisor, num_slots, num_experts, num_pairs, in_features, max_rank;
  int32_t xa_rank_stride, num_slices, splits, split_features, blocks_per_matrix;
  bool packed, float_weights;
  ShrinkMatrix matrices[kMaxSlices];  // one where A is packed
};

template <int kRowBlocks>
struct ShrinkShared {
  static constexpr int kRows = 16 * kRowBlocks;
  static constexpr int kStride = kRows + 4;  // no two lanes of a store or load share a bank
  int ranks[kCachedSlots];
  int pairs[kMoeTilePairs];  // -1: none
  float scales[kMoeTilePairs];
  alignas(16) float partial[kMoeWarps][16][kStride];
};

struct ShrinkWork {
  int count, rank;
  int matrix, row0, rows;  // rows of the whole matrix
  int k_begin, k_end, split;
};

template <typename T, bool kVector>
__device__ __forceinline__ void load_chunk(device::Chunk<T, 8>& chunk, const T* row, int k, int end,
                                           bool exists) {
  if constexpr (kVector) {
    device::load_vector(chunk, row + k, exists && k < end);
  } else {
    device::load_scalars(chunk, row + k, exists ? end - k : 0);
  }
}

// kBlocks: blocks of 8 pairs. kSteps: 32-wide steps of K whose loads are in flight together.
template <typename T, int kRowBlocks, int kBlocks, int kSteps, bool kVector>
__device__ __forceinline__ void shrink_tile(const ShrinkParams& p, const ShrinkWork& work,
                                            const T* a, int64_t a_stride,
                                            ShrinkShared<kRowBlocks>& shared) {
  using Shared = ShrinkShared<kRowBlocks>;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4,
            q = lane % 4;
  const T* x = static_cast<const T*>(p.x);
  const int first_row = work.row0 + g;
  const T* a_row = a + first_row * a_stride;
  float acc[kRowBlocks][kBlocks][4] = {};
  // Neighbouring warps take neighbouring 64-byte pieces of the same rows, so that DRAM sees runs.
  for (int start = work.k_begin; start < work.k_end; start += 32 * kMoeWarps * kSteps) {
    const int k0 = start + 32 * warp + 8 * q;
    device::Chunk<T, 8> weights[kSteps][2 * kRowBlocks], tokens[kSteps][kBlocks];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < 2 * kRowBlocks; ++i) {
        load_chunk<T, kVector>(weights[s][i], a_row + 8 * i * a_stride, k0 + 32 * kMoeWarps * s,
                               work.k_end, first_row + 8 * i < work.rows);
      }
    }
    if (start == work.k_begin) {
      __syncthreads();  // the tile's pairs, on their way behind the first weights
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      if (n == 0 || 8 * n < work.count) {
        const int pair = shared.pairs[8 * n + g];
        const T* row =
            x + static_cast<int>(static_cast<unsigned>(max(pair, 0)) / p.x_divisor) * p.x_stride;
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          load_chunk<T, kVector>(tokens[s][n], row, k0 + 32 * kMoeWarps * s, work.k_end, pair >= 0);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      if (n == 0 || 8 * n < work.count) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
#pragma unroll
          for (int w = 0; w < 4; w += 2) {
#pragma unroll
            for (int block = 0; block < kRowBlocks; ++block) {
              device::mma<T>(acc[block][n], weights[s][2 * block].words[w],
                             weights[s][2 * block + 1].words[w], weights[s][2 * block].words[w + 1],
                             weights[s][2 * block + 1].words[w + 1], tokens[s][n].words[w],
                             tokens[s][n].words[w + 1]);
            }
          }
        }
      }
    }
  }

  // The sum over the warps, up to 16 pairs at a time.
  constexpr int kRound = kBlocks == 1 ? 8 : 16, kQuads = Shared::kRows / 4;
  float* out = p.xa + work.split * p.xa_plane;
#pragma unroll
  for (int n0 = 0; n0 < kBlocks; n0 += kRound / 8) {
    if (8 * n0 >= work.count) {
      break;
    }
#pragma unroll
    for (int n = n0; n < n0 + kRound / 8; ++n) {
#pragma unroll
      for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          shared.partial[warp][8 * (n - n0) + 2 * q + e % 2][16 * block + 8 * (e / 2) + g] =
              acc[block][n][e];
        }
      }
    }
    __syncthreads();
    for (int i = thread; i < kRound * kQuads; i += kMoeThreads) {
      const int token = i / kQuads, row = work.row0 + i % kQuads * 4;
      const int pair = shared.pairs[8 * n0 + token];
      if (pair < 0 || row >= work.rows) {
        continue;
      }
      float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
      for (int w = 0; w < kMoeWarps; ++w) {
        const float4 part =
            *reinterpret_cast<const float4*>(&shared.partial[w][token][i % kQuads * 4]);
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
      const float scale = shared.scales[8 * n0 + token];
      sum = make_float4(sum.x * scale, sum.y * scale, sum.z * scale, sum.w * scale);
      float* to = out + pair * p.xa_row_stride;
      if (!p.packed) {  // what lies behind the rank is 0
        *reinterpret_cast<float4*>(to + work.matrix * p.xa_rank_stride + row) = sum;
      } else if (work.rank % 4 == 0) {
        const int slice = row / work.rank;
        *reinterpret_cast<float4*>(to + slice * p.xa_rank_stride + row - slice * work.rank) = sum;
      } else {
        const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int slice = (row + e) / work.rank;
          if (row + e < work.rows) {
            to[slice * p.xa_rank_stride + row + e - slice * work.rank] = values[e];
          }
        }
      }
    }
    __syncthreads();
  }
}

template <typename T, int kRowBlocks, bool kVector>
__global__ void __launch_bounds__(kMoeThreads, kRowBlocks == 4 ? 2 : 3)
    moe_shrink_kernel(const __grid_constant__ ShrinkParams p) {
  __shared__ ShrinkShared<kRowBlocks> shared;
  const int thread = threadIdx.x;
  device::grid_dependency_wait();
  device::grid_dependency_launch();
  const int num_tiles = p.routing.num_tiles();
  const int32_t* permutation = p.routing.permutation();
  MoeTile tile = p.routing.tile(blockIdx.y);
  const bool cached = p.num_slots <= kCachedSlots;
  if (cached && thread < p.num_slots) {
    shared.ranks[thread] = p.ranks[thread];
  }
  ShrinkWork work;
  const int block = blockIdx.x / p.splits;
  work.split = blockIdx.x % p.splits;
  work.matrix = block / p.blocks_per_matrix;
  work.row0 = block % p.blocks_per_matrix * 16 * kRowBlocks;
  work.k_begin = work.split * p.split_features;
  work.k_end = min(work.k_begin + p.split_features, p.in_features);
  const ShrinkMatrix& matrix = p.matrices[work.matrix];
  __syncthreads();
  for (int index = blockIdx.y; index < num_tiles; index += gridDim.y) {
    if (index != blockIdx.y) {
      tile = p.routing.tile(index);
    }
    if (!is_valid(tile, p.num_slots, p.num_experts)) {
      continue;
    }
    work.count = tile.count;
    work.rank = min(cached ? shared.ranks[tile.slot] : p.ranks[tile.slot], p.max_rank);
    work.rows = work.rank * (p.packed ? p.num_slices : 1);
    if (work.row0 >= work.rows) {
      continue;
    }
    const T* a = static_cast<const T*>(matrix.a) + tile.slot * matrix.slot_stride +
                 tile.expert * matrix.expert_stride;
    if (thread < kMoeTilePairs) {
      int pair = thread < tile.count ? permutation[tile.start + thread] : -1;
      pair = pair < p.num_pairs ? pair : -1;
      float scale = 0.0f;
      if (pair >= 0) {
        scale = p.scalings[tile.slot];
        if (p.topk_weights != nullptr) {
          scale *= p.float_weights ? static_cast<const float*>(p.topk_weights)[pair]
                                   : device::to_float(static_cast<const T*>(p.topk_weights)[pair]);
        }
      }
      shared.pairs[thread] = pair;
      shared.scales[thread] = scale;
    }
    // In-flight steps of K that the registers left by accumulators and pairs allow.
    constexpr int kFew = kVector ? (kRowBlocks == 4 ? 3 : kRowBlocks == 2 ? 5 : 8) : 1;
    constexpr int kSome = kVector ? (kRowBlocks == 4 ? 3 : kRowBlocks == 2 ? 4 : 6) : 1;
    constexpr int kMany = kVector && kRowBlocks == 1 ? 2 : 1;
    if (work.count <= 8) {
      shrink_tile<T, kRowBlocks, 1, kFew, kVector>(p, work, a, matrix.row_stride, shared);
    } else if (work.count <= 16) {
      shrink_tile<T, kRowBlocks, 2, kSome, kVector>(p, work, a, matrix.row_stride, shared);
    } else {
      shrink_tile<T, kRowBlocks, 8, kMany, kVector>(p, work, a, matrix.row_stride, shared);
    }
  }
}

template <typename T>
cudaError_t launch(const ShrinkParams& params, const MoeShrinkConfig& config, bool vector,
                   const LaunchShape& shape, void* stream) {
  const auto kernel = !vector                  ? moe_shrink_kernel<T, 1, false>
                      : config.row_blocks == 1 ? moe_shrink_kernel<T, 1, true>
                      : config.row_blocks == 2 ? moe_shrink_kernel<T, 2, true>
                                               : moe_shrink_kernel<T, 4, true>;
  return launch_kernel(kernel, shape, stream, params);
}

}  // namespace

bool moe_shrink_is_vector(const MoeApplyParams& p) {
  return is_multiple(p.x, p.x_stride, 8, 16) && p.in_features % 8 == 0 &&
         is_multiple(p.a, p.slices.count, 8, 16);
}

cudaError_t moe_shrink(const MoeApplyParams& p, const MoeShrinkConfig& config) {
  const MoeWorkspace at(p, config.splits);
  const int num_matrices = p.a.rows_by_rank ? 1 : p.slices.count;
  ShrinkParams params{};
  params.routing = moe_routing(p);
  params.ranks = p.ranks;
  params.scalings = p.scalings;
  params.x = p.x;
  params.topk_weights = p.topk_weights;
  params.xa = static_cast<float*>(p.workspace);
  params.x_stride = p.x_stride;
  params.xa_row_stride = at.row_stride;
  params.xa_plane = at.plane;
  params.x_divisor = p.x_divisor;
  params.num_slots = p.num_slots;
  params.num_experts = p.num_experts;
  params.num_pairs = static_cast<int32_t>(p.num_pairs);
  params.in_features = static_cast<int32_t>(p.in_features);
  params.max_rank = p.max_rank;
  params.xa_rank_stride = static_cast<int32_t>(at.rank_stride);
  params.num_slices = p.slices.count;
  params.splits = config.splits;
  params.split_features = config.split_features;
  params.blocks_per_matrix = config.blocks / num_matrices;
  params.packed = p.a.rows_by_rank;
  params.float_weights = p.weights_dtype == DType::kFloat32;
  for (int i = 0; i < num_matrices; ++i) {
    params.matrices[i] = {p.a.base[i], p.a.slot_stride[i], p.a.expert_stride[i], p.a.row_stride[i]};
  }
  LaunchShape shape{};
  const int blocks = config.blocks * config.splits;
  shape.grid = dim3(static_cast<unsigned>(blocks),
                    static_cast<unsigned>(moe_grid_tiles(p.num_pairs, moe_groups(p), blocks,
                                                         device_properties().sm_count)));
  shape.threads = kMoeThreads;
  shape.cluster = 1;
  shape.dependent = true;
  const bool vector = moe_shrink_is_vector(p);
  return dispatch_half(p.dtype, [&](auto t) {
    return launch<typename decltype(t)::type>(params, config, vector, shape, p.stream);
  });
}

}  // namespace lora_ext::cuda
