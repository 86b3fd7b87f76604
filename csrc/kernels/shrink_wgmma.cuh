// xa = scaling * x A^T on sm_90a: tiles of up to 64 tokens of one slot by a warpgroup.
//
// A CTA computes 64 tokens x up to 192 columns of xa, so that x is read once for three slices of
// rank 64. x and A stream through shared memory in steps of 64 values of K, several steps ahead,
// and wgmma takes them from there: mma.sync would read shared memory once for each of the four
// warps, and that was the limit. Two CTAs fit an SM. The CTAs of a cluster split K, and their sums
// meet in distributed shared memory in fixed order.
#pragma once

#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "common/wgmma.cuh"
#include "kernels/heuristics.h"

namespace lora_ext::cuda {

constexpr int kWarpgroup = 128;  // threads

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr int kWgmmaThreads = kWarpgroup;
#else
constexpr int kWgmmaThreads = 32;  // tells the launcher that the kernel is empty here
#endif

// kRows: columns of xa (rows of A) that a CTA computes. As many stages as leave room for two CTAs.
template <int kRows>
struct WgmmaTraits {
  static constexpr int kStepK = 64;  // 128 bytes of a row, which is what the swizzle spans
  static constexpr int kStages = kRows == 32 ? 8 : kRows == 64 ? 6 : kRows == 128 ? 4 : 3;
  static constexpr int kCopyRows = kWarpgroup / 8;  // that the block copies with one copy a thread
  static constexpr int kStageBytes = (kWideTileTokens + kRows) * kStepK * 2;
  static constexpr int kSumStride = kRows + 4;  // floats between tokens of the sums
  static constexpr int kIdsAt = kStages * kStageBytes;
  static constexpr int kAlignment = 1024;  // of a stage, for the swizzle
  static constexpr int kSharedBytes = kIdsAt + kWideTileTokens * 4 + kAlignment;
  static_assert(kWideTileTokens * kSumStride * 4 <= kIdsAt);
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <typename T, int kRows>
__device__ __forceinline__ void shrink_wgmma_tile(const ShrinkParams& p, const Tile& tile, int rank,
                                                  int cluster, unsigned char* shared) {
  using Traits = WgmmaTraits<kRows>;
  constexpr int kStages = Traits::kStages, kStepK = Traits::kStepK, kCopyRows = Traits::kCopyRows;
  constexpr int kCopiesX = kWideTileTokens / kCopyRows, kCopiesA = kRows / kCopyRows;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int member = blockIdx.x % cluster, first_column = blockIdx.y * kRows;
  const int columns = rank * p.num_slices;  // of xa in use
  int* token_ids = reinterpret_cast<int*>(shared + Traits::kIdsAt);

  const int in_features = static_cast<int>(p.in_features);
  const int steps = (in_features + kStepK - 1) / kStepK;
  const int step_begin = steps * member / cluster,
            num_steps = steps * (member + 1) / cluster - step_begin;

  // The rows that this thread copies are fixed over K: only a pointer moves. Rows that do not exist
  // are not copied: what lies in their place reaches only sums that nobody reads.
  const int chunk = thread % 8, row = thread / 8;
  int k = step_begin * kStepK + chunk * 8;
  const T* x_rows[kCopiesX];
#pragma unroll
  for (int i = 0; i < kCopiesX; ++i) {
    const int t = row + kCopyRows * i;
    int id = t < tile.count ? p.plan.permutation[tile.start + t] : -1;
    id = id < p.num_tokens ? id : -1;  // a plan may be for more tokens than this call has
    x_rows[i] = id >= 0 ? static_cast<const T*>(p.x) + id * p.x_stride + k : nullptr;
    if (chunk == 0) {
      token_ids[t] = id;
    }
  }
  const T* a_rows[kCopiesA];
#pragma unroll
  for (int i = 0; i < kCopiesA; ++i) {
    const int column = first_column + row + kCopyRows * i;
    const int slice = column < columns ? column / rank : 0;
    a_rows[i] = column < columns
                    ? static_cast<const T*>(p.a.base[slice]) +
                          p.a.row_offset(tile.slot, slice, rank, column - slice * rank) + k
                    : nullptr;
  }
  const int swizzled = (row * 8 + (chunk ^ row % 8)) * 16;
  int staged = 0, staged_at = 0;
  const auto stage = [&] {
    if (staged < num_steps) {
      const int bytes = k < in_features ? 16 : 0;  // 0 reads nothing and writes zeros
      unsigned char* to = shared + staged_at + swizzled;
#pragma unroll
      for (int i = 0; i < kCopiesX; ++i) {
        if (x_rows[i] != nullptr) {
          device::copy_async_16(to + kCopyRows * i * 128, x_rows[i], bytes);
          x_rows[i] += kStepK;
        }
      }
      to += kWideTileTokens * 128;
#pragma unroll
      for (int i = 0; i < kCopiesA; ++i) {
        if (a_rows[i] != nullptr) {
          device::copy_async_16(to + kCopyRows * i * 128, a_rows[i], bytes);
          a_rows[i] += kStepK;
        }
      }
      k += kStepK;
      ++staged;
    }
    staged_at += Traits::kStageBytes;
    staged_at = staged_at < kStages * Traits::kStageBytes ? staged_at : 0;
    device::copy_async_commit();
  };

  float acc[kRows / 2];
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) {
    acc[i] = 0.0f;
  }
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    stage();
  }
  int used_at = 0;
  for (int step = 0; step < num_steps; ++step) {
    device::copy_async_wait<kStages - 2>();
    device::fence_shared_for_products();
    device::wgmma_wait<0>();
    __syncthreads();  // this step's data are there, and every warp's part of the product before is
                      // done: its stage is filled next
    const uint64_t tokens = device::swizzled_tile(shared + used_at);
    const uint64_t weights = device::swizzled_tile(shared + used_at + kWideTileTokens * 128);
    device::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kStepK / 16; ++kk) {
      device::wgmma<T, kRows>(acc, tokens + 2 * kk, weights + 2 * kk);
    }
    device::wgmma_commit();
    used_at += Traits::kStageBytes;
    used_at = used_at < kStages * Traits::kStageBytes ? used_at : 0;
    stage();
  }
  device::wgmma_wait<0>();
  device::copy_async_wait<0>();
  __syncthreads();  // the stages become the buffer of the sums

  float* sums = reinterpret_cast<float*>(shared);  // [64][kSumStride]
  const int g = lane / 4, q = lane % 4;
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float* to = sums + (warp * 16 + 8 * h + g) * Traits::kSumStride + 8 * n + 2 * q;
      *reinterpret_cast<float2*>(to) = make_float2(acc[4 * n + 2 * h], acc[4 * n + 2 * h + 1]);
    }
  }
  const bool joined = cluster > 1;
  if (joined) {
    device::cluster_arrive();
    device::cluster_wait();
  } else {
    __syncthreads();
  }
  // Members share the tokens; each adds up all members' sums for its own, in the order of the
  // cluster.
  const float scaling = p.scalings[tile.slot];
  const int used = min(columns - first_column, kRows);
  const bool whole_quads = p.xa_stride % 4 == 0 && device::is_aligned(p.xa, 16);
  constexpr int kQuads = kRows / 4;
  for (int i = thread; i < (tile.count - member + cluster - 1) / cluster * kQuads;
       i += kWarpgroup) {
    const int t = i / kQuads * cluster + member, column = i % kQuads * 4;
    const int id = column < used ? token_ids[t] : -1;
    if (id < 0) {
      continue;
    }
    const float* from = sums + t * Traits::kSumStride + column;
    float4 sum = make_float4(0, 0, 0, 0);
    if (joined) {
#pragma unroll 8
      for (int c = 0; c < cluster; ++c) {
        const float4 next = device::load_peer(device::peer_address(from, c));
        sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
      }
    } else {
      sum = *reinterpret_cast<const float4*>(from);
    }
    sum.x *= scaling, sum.y *= scaling, sum.z *= scaling, sum.w *= scaling;
    float* to = static_cast<float*>(p.xa) + id * p.xa_stride + first_column + column;
    if (whole_quads && column + 4 <= used) {
      *reinterpret_cast<float4*>(to) = sum;
    } else {
      const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (column + e < used) {
          to[e] = values[e];
        }
      }
    }
  }
  if (joined) {
    device::cluster_arrive();  // peers may still be reading this CTA's sums
    device::cluster_wait();
  } else {
    __syncthreads();
  }
}
#endif

// A cluster serves every so manyth tile, so that a grid of likely size does for any batch.
template <typename T, int kRows>
__global__ void __launch_bounds__(kWgmmaThreads)
    shrink_wgmma_kernel(const __grid_constant__ ShrinkParams p, int cluster, int max_tiles) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char unaligned[];
  unsigned char* shared =
      unaligned + (-device::shared_address(unaligned) & (WgmmaTraits<kRows>::kAlignment - 1));
  device::grid_dependency_wait();
  device::grid_dependency_launch();
  const int clusters = gridDim.x / cluster;
  for (int i = blockIdx.x / cluster; i < max_tiles; i += clusters) {
    const Tile tile = p.plan.wide_tiles[i];
    if (tile.slot < 0) {
      return;
    }
    const int rank = min(p.ranks[tile.slot], p.max_rank);
    if (static_cast<int>(blockIdx.y) * kRows < rank * p.num_slices) {  // the whole cluster alike
      shrink_wgmma_tile<T, kRows>(p, tile, rank, cluster, shared);
    }
  }
#endif
}

}  // namespace lora_ext::cuda
