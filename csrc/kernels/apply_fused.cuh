// Shrink and expand in one launch: the decode kernel (sm_90).
//
// A cluster of C CTAs serves one (tile of up to 16 tokens, slice). Each CTA contracts its part of
// K, the partial products meet through distributed shared memory in fixed order, and each CTA
// expands its part of N. Per CTA:
//   1. start the asynchronous copy of its first rows of B: they do not depend on anything;
//   2. x A^T over its K range: the weights are the 16-row operand of the mma and the tokens the
//   8-column one, so that a tile
//      of one token wastes no weight bandwidth; 16-byte loads straight from global memory, a batch
//      of them in flight;
//   3. sum over warps in shared memory, cluster barrier, sum over CTAs: xa in fp32, scaled, then
//   split into two 16-bit
//      halves for the tensor cores;
//   4. xa B^T, 64 columns of y a warp at a time; y is read once, added to in fp32, rounded once.
// Weights are read once per tile, at their true rank. Order of every sum is fixed: same inputs,
// same bits.
#pragma once

#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "kernels/heuristics.h"

namespace lora_ext::cuda {

constexpr int kFusedWarps = 8;
constexpr int kFusedThreads = 32 * kFusedWarps;
constexpr int kPartialStride =
    20;  // floats between rows of 16 tokens: float2 stores of a half-warp hit distinct banks
constexpr int kUnitColumns =
    64;  // columns of y that a warp updates at a time: 8 lanes of 16 bytes for each token

template <int kRowBlocks>
struct FusedTraits {
  static constexpr int kRows = 16 * kRowBlocks;  // ranks of one pass of the shrink
  static constexpr int kSteps =
      kRowBlocks == 4 ? 1 : 2;  // 32-wide K steps whose loads are in flight together
  static constexpr int kChunk =
      kRowBlocks == 1 ? 4 : 8;              // neighbouring ranks of B that a lane holds
  static constexpr int kSpan = 4 * kChunk;  // ranks of one expand step
  static constexpr int kStaged = kRowBlocks <= 2 ? 1 : 2;  // expand steps whose B is copied ahead
  static constexpr int kMinBlocks = 2;
};

struct FusedShared {
  int stage, partial, part, xa, bytes;  // byte offsets
};
template <int kRowBlocks>
LORA_EXT_HOST_DEVICE FusedShared fused_shared(int max_rank) {
  using Traits = FusedTraits<kRowBlocks>;
  const int rank = (max_rank + 31) / 32 * 32;
  FusedShared at{};
  at.stage = 128;  // behind the token ids and maxima
  at.partial = at.stage + kFusedThreads * Traits::kStaged * 8 * Traits::kChunk * 2;
  at.part = at.partial + kFusedWarps * Traits::kRows * kPartialStride * 4;
  at.xa = at.part + rank * 16 * 4;
  at.bytes = at.xa + 2 * 16 * (rank + 8) * 2;
  return at;
}

// acc[block][n][..] += A rows x tokens over this warp's share of [k_begin, k_end). `rows` rows from
// `a` exist.
template <typename T, int kRowBlocks, bool kVector>
__device__ __forceinline__ void shrink_range(float (&acc)[kRowBlocks][2][4], const T* a,
                                             int64_t a_stride, int rows, const T* x0, const T* x1,
                                             int64_t k_begin, int64_t k_end) {
  constexpr int kSteps = FusedTraits<kRowBlocks>::kSteps;
  using Row = device::Chunk<T, 8>;
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4, warp = threadIdx.x / 32;
  const auto load = [](Row& chunk, const T* row, int64_t k, int64_t end) {
    if constexpr (kVector) {
      device::load_vector(chunk, row + k, row != nullptr && k < end);
    } else {
      device::load_scalars(chunk, row + k, row != nullptr ? end - k : 0);
    }
  };
  // Neighbouring warps take neighbouring 64-byte pieces of the same rows, so that DRAM sees long
  // runs.
  for (int64_t start = k_begin; start < k_end; start += 32 * kFusedWarps * kSteps) {
    Row weights[kSteps][kRowBlocks][2], tokens[kSteps][2];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int64_t k = start + 32 * (s * kFusedWarps + warp) + 8 * q;
#pragma unroll
      for (int b = 0; b < kRowBlocks; ++b) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = 16 * b + 8 * h + g;
          load(weights[s][b][h], row < rows ? a + row * a_stride : nullptr, k, k_end);
        }
      }
      load(tokens[s][0], x0, k, k_end);
      load(tokens[s][1], x1, k, k_end);
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int b = 0; b < kRowBlocks; ++b) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            device::mma<T>(acc[b][n], weights[s][b][0].words[2 * half],
                           weights[s][b][1].words[2 * half], weights[s][b][0].words[2 * half + 1],
                           weights[s][b][1].words[2 * half + 1], tokens[s][n].words[2 * half],
                           tokens[s][n].words[2 * half + 1]);
          }
        }
      }
    }
  }
}

// One chunk of a row of B into shared memory; ranks from `rank` on become 0 and are never read.
template <typename T, int kChunk>
__device__ __forceinline__ void stage_chunk(T* to, const T* row, int j, int rank, bool vector) {
  const int valid = row == nullptr ? 0 : min(max(rank - j, 0), kChunk);
  const T* from = valid > 0 ? row + j : reinterpret_cast<const T*>(to);
  if (vector) {
    const void* source = valid > 0 ? static_cast<const void*>(from) : row;
    if constexpr (kChunk == 8) {
      device::copy_async_16(to, source, 2 * valid);
    } else {
      device::copy_async_8(to, source, 2 * valid);
    }
  } else {
    device::Chunk<T, kChunk> chunk;
    device::load_scalars(chunk, row == nullptr ? row : row + j, valid);
    *reinterpret_cast<device::Chunk<T, kChunk>*>(to) = chunk;
  }
}

template <typename T, typename Y, int kRowBlocks>
__global__ void __launch_bounds__(kFusedThreads, FusedTraits<kRowBlocks>::kMinBlocks)
    apply_fused_kernel(const __grid_constant__ ApplyParams p, int cluster, bool vector_a,
                       bool vector_b, bool vector_y) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using Traits = FusedTraits<kRowBlocks>;
  constexpr int kChunk = Traits::kChunk, kSpan = Traits::kSpan, kStaged = Traits::kStaged;
  extern __shared__ __align__(128) unsigned char shared[];
  const FusedShared at = fused_shared<kRowBlocks>(p.max_rank);
  int* token_ids = reinterpret_cast<int*>(shared);
  int* token_max =
      reinterpret_cast<int*>(shared + 64);  // fp16 only: bits of the largest |xa| of each token
  T* staged = reinterpret_cast<T*>(shared + at.stage);
  float* partial = reinterpret_cast<float*>(shared + at.partial);  // [warp][row][kPartialStride]
  float* part = reinterpret_cast<float*>(shared + at.part);  // [row][16], read by the whole cluster
  const int xa_stride = (p.max_rank + 31) / 32 * 32 + 8;
  T* xa_high = reinterpret_cast<T*>(shared + at.xa);  // [16][xa_stride]
  T* xa_low = xa_high + 16 * xa_stride;

  const int member = blockIdx.x % cluster, slice = blockIdx.y;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4,
            q = lane % 4;

  device::grid_dependency_wait();
  device::grid_dependency_launch();
  const Tile tile = p.plan.tiles[blockIdx.x / cluster];
  if (tile.slot < 0) {
    return;  // the whole cluster alike
  }
  const int rank = min(p.ranks[tile.slot], p.max_rank);
  if (rank <= 0) {
    return;
  }
  if (thread < 16) {
    token_ids[thread] = thread < tile.count ? p.plan.permutation[tile.start + thread] : -1;
    token_max[thread] = 0;
  }
  const float scaling = p.scalings[tile.slot];
  const int token0 = g < tile.count ? p.plan.permutation[tile.start + g] : -1;
  const int token1 = g + 8 < tile.count ? p.plan.permutation[tile.start + g + 8] : -1;

  // 1. B of the warp's first unit, each lane the chunks that it will feed to the tensor cores
  // itself.
  const int first_column = p.slices.offset[slice];
  const int width = p.slices.offset[slice + 1] - first_column;
  const T* b = static_cast<const T*>(p.b.base[slice]) + p.b.row_offset(tile.slot, slice, rank, 0);
  const int64_t b_stride = p.b.stride(slice, rank);
  const bool b_is_vector = vector_b && b_stride % kChunk == 0 && device::is_aligned(b, 2 * kChunk);
  const int first_unit = member * kFusedWarps + warp;
  const auto stage = [&](int unit, int step) {
#pragma unroll
    for (int s = 0; s < kStaged; ++s) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int n = unit * kUnitColumns + 8 * g + i;
        stage_chunk<T, kChunk>(staged + ((s * 8 + i) * kFusedThreads + thread) * kChunk,
                               n < width ? b + n * b_stride : nullptr,
                               (step + s) * kSpan + q * kChunk, rank, b_is_vector && n < width);
      }
    }
    device::copy_async_commit();
  };
  stage(first_unit, 0);

  // 2. This CTA's part of K, in whole 32-wide steps.
  const int64_t steps = (p.in_features + 31) / 32;
  const int64_t k_begin = min(steps * member / cluster * 32, p.in_features);
  const int64_t k_end = min(steps * (member + 1) / cluster * 32, p.in_features);
  const T* x = static_cast<const T*>(p.x);
  const T* x0 = token0 >= 0 ? x + token0 * p.x_stride : nullptr;
  const T* x1 = token1 >= 0 ? x + token1 * p.x_stride : nullptr;
  const T* a = static_cast<const T*>(p.a.base[slice]) + p.a.row_offset(tile.slot, slice, rank, 0);
  const int64_t a_stride = p.a.stride(slice, rank);
  const bool a_is_vector = vector_a && device::is_aligned(a, 16);
  for (int row0 = 0; row0 < rank; row0 += Traits::kRows) {
    float acc[kRowBlocks][2][4] = {};
    const int rows = min(rank - row0, Traits::kRows);
    if (a_is_vector) {
      shrink_range<T, kRowBlocks, true>(acc, a + row0 * a_stride, a_stride, rows, x0, x1, k_begin,
                                        k_end);
    } else {
      shrink_range<T, kRowBlocks, false>(acc, a + row0 * a_stride, a_stride, rows, x0, x1, k_begin,
                                         k_end);
    }
    if (row0 > 0) {
      __syncthreads();  // the sums below of the pass before are done with `partial`
    }
#pragma unroll
    for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float* to = partial + (warp * Traits::kRows + 16 * block + 8 * h + g) * kPartialStride +
                      8 * n + 2 * q;
          *reinterpret_cast<float2*>(to) =
              make_float2(acc[block][n][2 * h], acc[block][n][2 * h + 1]);
        }
      }
    }
    __syncthreads();
    for (int i = thread; i < rows * 4; i += kFusedThreads) {
      const float* from = partial + i / 4 * kPartialStride + i % 4 * 4;
      float4 sum = *reinterpret_cast<const float4*>(from);
#pragma unroll
      for (int w = 1; w < kFusedWarps; ++w) {
        const float4 next =
            *reinterpret_cast<const float4*>(from + w * Traits::kRows * kPartialStride);
        sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
      }
      *reinterpret_cast<float4*>(part + row0 * 16 + i * 4) = sum;
    }
  }

  // y of the first unit: in flight across the barrier.
  device::Outputs<Y> outputs[2][2];
  int ids[2][2];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      ids[n][e] = token_ids[8 * n + 2 * q + e];
    }
  }
  Y* y = static_cast<Y*>(p.y) + first_column;
  const auto load_outputs = [&](int unit) {
    const int column = unit * kUnitColumns + 8 * g;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (ids[n][e] >= 0 && column < width) {
          const Y* from = y + ids[n][e] * p.y_stride + column;
          if (vector_y && column + 8 <= width) {
            outputs[n][e].load(from);
          } else {
            outputs[n][e].load_scalars(from, width - column);
          }
        }
      }
    }
  };
  load_outputs(first_unit);

  // 3. All CTAs' parts, in the order of the cluster; ranks up to the next multiple of an expand
  // step become 0.
  const int padded = (rank + kSpan - 1) / kSpan * kSpan;
  if (cluster > 1) {
    device::cluster_arrive();
    device::cluster_wait();
  } else {
    __syncthreads();
  }
  const auto pull = [&](int i) {  // four tokens of row i / 4
    float4 sum = make_float4(0, 0, 0, 0);
    if (i / 4 >= rank) {
      return sum;
    }
    if (cluster == 1) {
      sum = *reinterpret_cast<const float4*>(part + i * 4);
    } else {
#pragma unroll 8
      for (int c = 0; c < cluster; ++c) {
        const float4 next = device::load_peer(device::peer_address(part + i * 4, c));
        sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
      }
    }
    return make_float4(sum.x * scaling, sum.y * scaling, sum.z * scaling, sum.w * scaling);
  };
  if constexpr (device::kNeedsScale<T>) {
    for (int i = thread; i < padded * 4; i += kFusedThreads) {
      const float4 sum = pull(i);
      atomicMax(token_max + i % 4 * 4, __float_as_int(fabsf(sum.x)));
      atomicMax(token_max + i % 4 * 4 + 1, __float_as_int(fabsf(sum.y)));
      atomicMax(token_max + i % 4 * 4 + 2, __float_as_int(fabsf(sum.z)));
      atomicMax(token_max + i % 4 * 4 + 3, __float_as_int(fabsf(sum.w)));
    }
    __syncthreads();
  }
  for (int i = thread; i < padded * 4; i += kFusedThreads) {
    const int row = i / 4, token = i % 4 * 4;
    const float4 sum = pull(i);
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float scale = device::kNeedsScale<T> ? device::scale_down(token_max[token + e]) : 1.0f;
      T high, low;
      device::split(values[e] * scale, high, low);
      xa_high[(token + e) * xa_stride + row] = high;
      xa_low[(token + e) * xa_stride + row] = low;
    }
  }
  __syncthreads();
  if (cluster > 1) {
    device::cluster_arrive();  // done with the peers' shared memory; they may not leave before that
  }

  // 4. Units of 64 columns. Row m of the mma's 16 weight rows stands for column 8 g + i of the
  // unit, so that a lane's results of the four row blocks are eight neighbours in y.
  for (int unit = first_unit; unit * kUnitColumns < width; unit += cluster * kFusedWarps) {
    if (unit != first_unit) {
      load_outputs(unit);
    }
    float acc[4][2][4] = {};
    for (int step = 0; step * kSpan < rank; step += kStaged) {
      if (unit != first_unit || step != 0) {
        stage(unit, step);
      }
      device::copy_async_wait<0>();
#pragma unroll
      for (int s = 0; s < kStaged; ++s) {
        if ((step + s) * kSpan < rank) {
          device::Chunk<T, kChunk> weights[8], high[2], low[2];
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            weights[i] = *reinterpret_cast<const device::Chunk<T, kChunk>*>(
                staged + ((s * 8 + i) * kFusedThreads + thread) * kChunk);
          }
          const int j = (step + s) * kSpan + q * kChunk;
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            high[n] = *reinterpret_cast<const device::Chunk<T, kChunk>*>(
                xa_high + (8 * n + g) * xa_stride + j);
            low[n] = *reinterpret_cast<const device::Chunk<T, kChunk>*>(
                xa_low + (8 * n + g) * xa_stride + j);
          }
#pragma unroll
          for (int block = 0; block < 4; ++block) {
#pragma unroll
            for (int w = 0; w < kChunk / 2; w += 2) {
#pragma unroll
              for (int n = 0; n < 2; ++n) {
                device::mma<T>(acc[block][n], weights[2 * block].words[w],
                               weights[2 * block + 1].words[w], weights[2 * block].words[w + 1],
                               weights[2 * block + 1].words[w + 1], high[n].words[w],
                               high[n].words[w + 1]);
                device::mma<T>(acc[block][n], weights[2 * block].words[w],
                               weights[2 * block + 1].words[w], weights[2 * block].words[w + 1],
                               weights[2 * block + 1].words[w + 1], low[n].words[w],
                               low[n].words[w + 1]);
              }
            }
          }
        }
      }
    }
    const int column = unit * kUnitColumns + 8 * g;
    if (column < width) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (ids[n][e] >= 0) {
            float delta[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              delta[i] = acc[i / 2][n][i % 2 * 2 + e];
              if constexpr (device::kNeedsScale<T>) {
                delta[i] *= device::scale_up(token_max[8 * n + 2 * q + e]);
              }
            }
            outputs[n][e].add(delta);
            Y* to = y + ids[n][e] * p.y_stride + column;
            if (vector_y && column + 8 <= width) {
              outputs[n][e].store(to);
            } else {
              outputs[n][e].store_scalars(to, width - column);
            }
          }
        }
      }
    }
  }
  if (cluster > 1) {
    device::cluster_wait();
  }
#endif
}

}  // namespace lora_ext::cuda
