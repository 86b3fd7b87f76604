// y += xa B^T for tiles of tokens of one slot: what moves is y, read and written once.
//
// A CTA serves one (tile, slice) and a range of columns. xa is split into two 16-bit halves in
// shared memory once. A warp takes 32 columns at a time: column c of mma block i stands for column
// (c / 2) * 8 + 2 i + c % 2, so that a lane's results of four blocks are eight neighbours of y and
// every access of y has 16 bytes. The y of the next 32 columns is on its way (cp.async to where the
// same lane will read it, so no barrier is needed) while this one is computed.
#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "kernels/heuristics.h"
#include "kernels/kernels.h"
#include "kernels/launch.cuh"

namespace lora_ext::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kColumns = 32;  // of a warp at a time
constexpr int kSpan = 32;     // ranks of one step: 8 neighbours a lane

template <typename Y, int kTokens>
struct ExpandShared {
  static constexpr int kOutputs = kTokens / 8;  // Outputs of a lane
  static constexpr int kOutputBytes = kThreads * kOutputs * 8 * sizeof(Y);
  static constexpr int kHeader = kTokens * 8;  // token ids and maxima
  static int bytes(int max_rank) {
    return kHeader + 2 * kOutputBytes +
           2 * kTokens * (static_cast<int>(round_up(max_rank, kSpan)) + 8) * 2;
  }
};

template <typename T, typename Y, int kTokens>
__global__ void __launch_bounds__(kThreads, 2)
    expand_kernel(const __grid_constant__ ExpandParams p, int columns_per_block, bool vector_b,
                  bool vector_y) {
  using Shared = ExpandShared<Y, kTokens>;
  constexpr int kBlocks = kTokens / 16;
  extern __shared__ __align__(128) unsigned char shared[];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4,
            q = lane % 4;
  int* token_ids = reinterpret_cast<int*>(shared);
  int* token_max = token_ids + kTokens;
  unsigned char* staged = shared + Shared::kHeader;  // [2][output][thread] of 8 values of y
  const int xa_stride = (p.max_rank + kSpan - 1) / kSpan * kSpan + 8;
  T* xa_high = reinterpret_cast<T*>(staged + 2 * Shared::kOutputBytes);  // [kTokens][xa_stride]
  T* xa_low = xa_high + kTokens * xa_stride;

  const Tile* tiles = kTokens == kTileTokens ? p.plan.tiles : p.plan.wide_tiles;
  device::grid_dependency_wait();
  device::grid_dependency_launch();
  const Tile tile = tiles[blockIdx.x];
  if (tile.slot < 0) {
    return;
  }
  const int rank = min(p.ranks[tile.slot], p.max_rank);
  const int slice = blockIdx.z;
  const int first_column = p.slices.offset[slice];
  const int width = p.slices.offset[slice + 1] - first_column;
  const int begin = blockIdx.y * columns_per_block, end = min(begin + columns_per_block, width);
  if (rank <= 0 || begin >= width) {
    return;
  }
  for (int i = thread; i < kTokens; i += kThreads) {
    token_ids[i] = i < tile.count ? p.plan.permutation[tile.start + i] : -1;
    token_max[i] = 0;
  }
  __syncthreads();

  Y* y = static_cast<Y*>(p.y) + first_column;
  const auto staged_at = [&](int buffer, int output) {
    return reinterpret_cast<Y*>(staged + buffer * Shared::kOutputBytes) +
           (output * kThreads + thread) * 8;
  };
  // Output o of a lane: token 16 * (o / 2) + 8 * (o % 2) + g of the tile, columns from `column`.
  const auto prefetch = [&](int unit, int buffer) {
    const int column = unit + 8 * q;
    if (vector_y && column + 8 <= end) {
#pragma unroll
      for (int o = 0; o < Shared::kOutputs; ++o) {
        const int id = token_ids[8 * o + g];
        if (id >= 0) {
          const Y* from = y + id * p.y_stride + column;
          Y* to = staged_at(buffer, o);
#pragma unroll
          for (int i = 0; i < 8; i += 16 / sizeof(Y)) {
            device::copy_async_16(to + i, from + i, 16);
          }
        }
      }
    }
    device::copy_async_commit();
  };
  const int first_unit = begin + warp * kColumns;
  if (first_unit < end) {
    prefetch(first_unit, 0);
  }

  // xa to two halves; ranks up to the end of a step become 0.
  const int padded = (rank + kSpan - 1) / kSpan * kSpan;
  const auto value_at = [&](int i) {
    const int id = token_ids[i / padded], j = i % padded;
    return id >= 0 && j < rank
               ? static_cast<const float*>(p.xa)[id * p.xa_stride + slice * rank + j]
               : 0.0f;
  };
  if constexpr (device::kNeedsScale<T>) {
    for (int i = thread; i < kTokens * padded; i += kThreads) {
      atomicMax(token_max + i / padded, __float_as_int(fabsf(value_at(i))));
    }
    __syncthreads();
  }
#pragma unroll 4
  for (int i = thread; i < kTokens * padded; i += kThreads) {
    const float scale = device::kNeedsScale<T> ? device::scale_down(token_max[i / padded]) : 1.0f;
    T high, low;
    device::split(value_at(i) * scale, high, low);
    xa_high[i / padded * xa_stride + i % padded] = high;
    xa_low[i / padded * xa_stride + i % padded] = low;
  }
  __syncthreads();

  const T* b = static_cast<const T*>(p.b.base[slice]) + p.b.row_offset(tile.slot, slice, rank, 0);
  const int64_t b_stride = p.b.stride(slice, rank);
  const bool b_is_vector = vector_b && b_stride % 8 == 0 && device::is_aligned(b, 16);
  using Ranks = device::Chunk<T, 8>;
  int buffer = 0;
  for (int unit = first_unit; unit < end; unit += kWarps * kColumns, buffer ^= 1) {
    float acc[kBlocks][4][4] = {};
    for (int j0 = 0; j0 < rank; j0 += kSpan) {
      const int j = j0 + 8 * q;
      Ranks weights[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = unit + g / 2 * 8 + 2 * i + g % 2;
        const bool inside = n < end && j < rank;
        if (b_is_vector && j + 8 <= rank) {
          device::load_vector(weights[i], b + n * b_stride + j, inside);
        } else {
          device::load_scalars(weights[i], b + n * b_stride + j, inside ? rank - j : 0);
        }
      }
      if (j0 == 0) {  // behind the weights, which are needed first
        if (unit + kWarps * kColumns < end) {
          prefetch(unit + kWarps * kColumns, buffer ^ 1);
        } else {
          device::copy_async_commit();
        }
      }
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        if (16 * m < tile.count) {
          Ranks high[2], low[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int at = (16 * m + 8 * h + g) * xa_stride + j;
            high[h] = *reinterpret_cast<const Ranks*>(xa_high + at);
            low[h] = *reinterpret_cast<const Ranks*>(xa_low + at);
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int w = 0; w < 4; w += 2) {
              device::mma<T>(acc[m][i], high[0].words[w], high[1].words[w], high[0].words[w + 1],
                             high[1].words[w + 1], weights[i].words[w], weights[i].words[w + 1]);
              device::mma<T>(acc[m][i], low[0].words[w], low[1].words[w], low[0].words[w + 1],
                             low[1].words[w + 1], weights[i].words[w], weights[i].words[w + 1]);
            }
          }
        }
      }
    }
    device::copy_async_wait<1>();
    const int column = unit + 8 * q;
    if (column < end) {
#pragma unroll
      for (int o = 0; o < Shared::kOutputs; ++o) {
        const int id = token_ids[8 * o + g];
        if (id < 0) {
          continue;
        }
        float delta[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          delta[i] = acc[o / 2][i / 2][o % 2 * 2 + i % 2];
          if constexpr (device::kNeedsScale<T>) {
            delta[i] *= device::scale_up(token_max[8 * o + g]);
          }
        }
        device::Outputs<Y> outputs;
        Y* to = y + id * p.y_stride + column;
        if (vector_y && column + 8 <= end) {
          outputs.load(staged_at(buffer, o));
          outputs.add(delta);
          outputs.store(to);
        } else {
          outputs.load_scalars(to, end - column);
          outputs.add(delta);
          outputs.store_scalars(to, end - column);
        }
      }
    }
  }
}

// fp32: a block serves one token, a thread one column at a time.
template <typename Y>
__global__ void __launch_bounds__(kThreads)
    expand_float_kernel(const __grid_constant__ ExpandParams p) {
  const int64_t token = blockIdx.x;
  const int slot = p.plan.token_slots[token];
  const int rank = slot >= 0 ? min(p.ranks[slot], p.max_rank) : 0;
  if (rank <= 0) {
    return;
  }
  Y* y = static_cast<Y*>(p.y) + token * p.y_stride;
  for (int slice = 0; slice < p.slices.count; ++slice) {
    const int first = p.slices.offset[slice], width = p.slices.offset[slice + 1] - first;
    const float* xa = static_cast<const float*>(p.xa) + token * p.xa_stride + slice * rank;
    for (int n = threadIdx.x; n < width; n += kThreads) {
      const float* b =
          static_cast<const float*>(p.b.base[slice]) + p.b.row_offset(slot, slice, rank, n);
      float sum = 0.0f;
      for (int j = 0; j < rank; ++j) {
        sum = fmaf(xa[j], b[j], sum);
      }
      y[first + n] = device::from_float<Y>(device::to_float(y[first + n]) + sum);
    }
  }
}

template <typename T, typename Y, int kTokens>
cudaError_t launch_expand(const ExpandParams& p, int columns) {
  int width = 0;
  bool vector_y = is_multiple(p.y, p.y_stride, 8, 16);
  for (int i = 0; i < p.slices.count; ++i) {
    width = max(width, p.slices.offset[i + 1] - p.slices.offset[i]);
    vector_y &= p.slices.offset[i] % 8 == 0;
  }
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(max_tiles(p.num_tokens, p.plan.num_slots, kTokens)),
                    static_cast<unsigned>(ceil_div(width, columns)), p.slices.count);
  shape.threads = kThreads;
  shape.shared_bytes = ExpandShared<Y, kTokens>::bytes(p.max_rank);
  shape.cluster = 1;
  shape.dependent = true;
  return launch_kernel(expand_kernel<T, Y, kTokens>, shape, p.stream, p, columns,
                       is_multiple(p.b, p.slices.count, 8, 16), vector_y);
}

}  // namespace

int expand(const ExpandParams& p) {
  if (p.dtype == DType::kFloat32) {
    const auto blocks = static_cast<unsigned>(p.num_tokens);
    const auto stream = static_cast<cudaStream_t>(p.stream);
    switch (p.y_dtype) {
      case DType::kFloat32:
        expand_float_kernel<float><<<blocks, kThreads, 0, stream>>>(p);
        break;
      case DType::kBFloat16:
        expand_float_kernel<__nv_bfloat16><<<blocks, kThreads, 0, stream>>>(p);
        break;
      default:
        expand_float_kernel<__half><<<blocks, kThreads, 0, stream>>>(p);
    }
    return cudaGetLastError();
  }
  ExpandShape shape{};
  shape.num_tokens = p.num_tokens;
  shape.num_slots = p.plan.num_slots;
  shape.out_features = p.slices.offset[p.slices.count];
  shape.num_slices = p.slices.count;
  shape.max_rank = p.max_rank;
  shape.sm_count = device_properties().sm_count;
  const ExpandConfig config = expand_config(shape);
  return dispatch_half_output(p.dtype, p.y_dtype, [&](auto t, auto y) {
    using T = typename decltype(t)::type;
    using Y = typename decltype(y)::type;
    return config.wide ? launch_expand<T, Y, kWideTileTokens>(p, config.columns)
                       : launch_expand<T, Y, kTileTokens>(p, config.columns);
  });
}

}  // namespace lora_ext::cuda
