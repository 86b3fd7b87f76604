// xa = scaling * x A^T for tiles of up to 64 tokens of one slot.
//
// A CTA computes 64 tokens x up to 256 columns of xa, so that x is read once for all slices (three
// of rank 64 fit). x and A stream through shared memory in steps of 64 values of K, several steps
// ahead; four warps split the tokens, two the columns. Where tiles are few the CTAs of a cluster
// split K, and their sums meet in distributed shared memory in fixed order.
#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "kernels/heuristics.h"
#include "kernels/kernels.h"
#include "kernels/launch.cuh"

namespace lora_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kStepK = 64;  // 128 bytes a row: one swizzle period, eight 16-byte chunks

template <int kRows>
struct ShrinkTraits {
  static constexpr int kStages = kRows <= 128 ? 4 : 3;
  static constexpr int kStageBytes = (kWideTileTokens + kRows) * kStepK * 2;
  static constexpr int kSumStride = kRows + 4;  // floats between tokens of the partial sums
  static constexpr int kSumBytes = kWideTileTokens * kSumStride * 4;
  static constexpr int kSharedBytes =
      kStages * kStageBytes > kSumBytes ? kStages* kStageBytes : kSumBytes;
};

// Where chunk `chunk` of row `row` lies in a stage: rotated within the row so that the eight rows
// of an ldmatrix hit distinct banks.
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * 128 + (chunk ^ (row % 8)) * 16;
}

template <typename T>
__device__ __forceinline__ void stage_row(unsigned char* to, const T* row, int64_t k,
                                          int64_t in_features, bool vector) {
  const int valid =
      row == nullptr ? 0 : static_cast<int>(max(int64_t{0}, min(in_features - k, int64_t{8})));
  if (vector) {
    device::copy_async_16(to, valid > 0 ? row + k : row, 2 * valid);
  } else {
    device::Chunk<T, 8> chunk;
    device::load_scalars(chunk, row + k, valid);
    *reinterpret_cast<device::Chunk<T, 8>*>(to) = chunk;
  }
}

template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads, kRows <= 64    ? 3
                                            : kRows <= 128 ? 2
                                                           : 1)
    shrink_kernel(const __grid_constant__ ShrinkParams p, int cluster, bool vector_x,
                  bool vector_a) {
  using Traits = ShrinkTraits<kRows>;
  constexpr int kStages = Traits::kStages;
  constexpr int kLoads = kRows / 32;      // rows of A that a thread copies
  constexpr int kBlocks = kRows / 2 / 8;  // 8-column blocks of a warp
  extern __shared__ __align__(128) unsigned char shared[];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int member = blockIdx.x % cluster;

  device::grid_dependency_wait();
  device::grid_dependency_launch();
  const Tile tile = p.plan.wide_tiles[blockIdx.x / cluster];
  if (tile.slot < 0) {
    return;  // the whole cluster alike
  }
  const int rank = min(p.ranks[tile.slot], p.max_rank);
  const int columns = rank * p.num_slices;  // columns of xa in use
  const int first_column = blockIdx.y * kRows;
  if (rank <= 0 || first_column >= columns) {
    return;
  }
  const float scaling = p.scalings[tile.slot];

  // The rows that this thread copies: fixed over K.
  const int chunk = thread % 8, row = thread / 8;
  const T* x_rows[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = row + 32 * i;
    x_rows[i] = t < tile.count
                    ? static_cast<const T*>(p.x) + p.plan.permutation[tile.start + t] * p.x_stride
                    : nullptr;
  }
  const T* a_rows[kLoads];
  bool a_is_vector = vector_a;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int column = first_column + row + 32 * i;
    a_rows[i] = nullptr;
    if (column < columns) {
      const int slice = column / rank;
      a_rows[i] = static_cast<const T*>(p.a.base[slice]) +
                  p.a.row_offset(tile.slot, slice, rank, column % rank);
      a_is_vector &= device::is_aligned(a_rows[i], 16);
    }
  }

  const int64_t steps = (p.in_features + kStepK - 1) / kStepK;
  const int64_t step_begin = steps * member / cluster, step_end = steps * (member + 1) / cluster;
  const auto stage = [&](int64_t step) {
    if (step < step_end) {
      unsigned char* x_stage = shared + (step - step_begin) % kStages * Traits::kStageBytes;
      unsigned char* a_stage = x_stage + kWideTileTokens * kStepK * 2;
      const int64_t k = step * kStepK + chunk * 8;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        stage_row(x_stage + swizzled(row + 32 * i, chunk), x_rows[i], k, p.in_features,
                  vector_x && x_rows[i] != nullptr);
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        stage_row(a_stage + swizzled(row + 32 * i, chunk), a_rows[i], k, p.in_features,
                  a_is_vector && a_rows[i] != nullptr);
      }
    }
    device::copy_async_commit();
  };

  float acc[kBlocks][4] = {};
  const int warp_token = warp / 2 * 16, warp_column = warp % 2 * (kRows / 2);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    stage(step_begin + s);
  }
  for (int64_t step = step_begin; step < step_end; ++step) {
    device::copy_async_wait<kStages - 2>();
    __syncthreads();  // this step's data are there, and every warp is done with the stage that is
                      // filled next
    stage(step + kStages - 1);
    const unsigned char* x_stage = shared + (step - step_begin) % kStages * Traits::kStageBytes;
    const unsigned char* a_stage = x_stage + kWideTileTokens * kStepK * 2;
    if (warp_token < tile.count) {
#pragma unroll
      for (int kk = 0; kk < kStepK / 16; ++kk) {
        uint32_t tokens[4];
        device::ldmatrix_x4(tokens, x_stage + swizzled(warp_token + lane % 16, kk * 2 + lane / 16));
#pragma unroll
        for (int n = 0; n < kBlocks; n += 2) {
          uint32_t weights[4];
          device::ldmatrix_x4(weights,
                              a_stage + swizzled(warp_column + 8 * n + lane / 16 * 8 + lane % 8,
                                                 kk * 2 + lane / 8 % 2));
          device::mma<T>(acc[n], tokens[0], tokens[1], tokens[2], tokens[3], weights[0],
                         weights[1]);
          device::mma<T>(acc[n + 1], tokens[0], tokens[1], tokens[2], tokens[3], weights[2],
                         weights[3]);
        }
      }
    }
  }
  device::copy_async_wait<0>();
  __syncthreads();  // the stages become the buffer of the sums

  float* sums = reinterpret_cast<float*>(shared);  // [64][kSumStride]
  const int g = lane / 4, q = lane % 4;
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float* to =
          sums + (warp_token + 8 * h + g) * Traits::kSumStride + warp_column + 8 * n + 2 * q;
      *reinterpret_cast<float2*>(to) = make_float2(acc[n][2 * h], acc[n][2 * h + 1]);
    }
  }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (cluster > 1) {
    device::cluster_arrive();
    device::cluster_wait();
  } else {
    __syncthreads();
  }
#else
  __syncthreads();
#endif
  // Members share the tokens; each adds up all members' sums for its own, in the order of the
  // cluster.
  const int used = min(columns - first_column, kRows);
  constexpr int kQuads = kRows / 4;
  for (int i = thread; i < kWideTileTokens / cluster * kQuads; i += kThreads) {
    const int t = i / kQuads * cluster + member, column = i % kQuads * 4;
    if (t >= tile.count || column >= used) {
      continue;
    }
    const float* from = sums + t * Traits::kSumStride + column;
    float4 sum = make_float4(0, 0, 0, 0);
    if (cluster == 1) {
      sum = *reinterpret_cast<const float4*>(from);
    }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (cluster > 1) {
#pragma unroll 8
      for (int c = 0; c < cluster; ++c) {
        const float4 next = device::load_peer(device::peer_address(from, c));
        sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
      }
    }
#endif
    float* to = static_cast<float*>(p.xa) + p.plan.permutation[tile.start + t] * p.xa_stride +
                first_column + column;
    const float values[4] = {sum.x * scaling, sum.y * scaling, sum.z * scaling, sum.w * scaling};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (column + e < used) {
        to[e] = values[e];
      }
    }
  }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (cluster > 1) {
    device::cluster_arrive();  // peers may still be reading this CTA's sums
    device::cluster_wait();
  }
#endif
}

// fp32: tensor cores would round x and A to tf32. A block serves one token, a warp one column of xa
// at a time.
__global__ void __launch_bounds__(kThreads)
    shrink_float_kernel(const __grid_constant__ ShrinkParams p) {
  const int lane = threadIdx.x % 32;
  const int64_t token = blockIdx.x;
  const int slot = p.plan.token_slots[token];
  const int rank = slot >= 0 ? min(p.ranks[slot], p.max_rank) : 0;
  const float* x = static_cast<const float*>(p.x) + token * p.x_stride;
  for (int column = threadIdx.x / 32; column < rank * p.num_slices; column += kThreads / 32) {
    const int slice = column / rank;
    const float* a = static_cast<const float*>(p.a.base[slice]) +
                     p.a.row_offset(slot, slice, rank, column % rank);
    float sum = 0.0f;
    for (int64_t k = lane; k < p.in_features; k += 32) {
      sum = fmaf(x[k], a[k], sum);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    if (lane == 0) {
      static_cast<float*>(p.xa)[token * p.xa_stride + column] = sum * p.scalings[slot];
    }
  }
}

template <typename T, int kRows>
cudaError_t launch_shrink(const ShrinkParams& p, const ShrinkConfig& config) {
  const int64_t tiles = max_tiles(p.num_tokens, p.plan.num_slots, kWideTileTokens);
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(tiles * config.cluster),
                    static_cast<unsigned>(ceil_div(int64_t{p.num_slices} * p.max_rank, kRows)));
  shape.threads = kThreads;
  shape.shared_bytes = ShrinkTraits<kRows>::kSharedBytes;
  shape.cluster = config.cluster;
  shape.dependent = !p.fill;  // a memset before it is no kernel
  return launch_kernel(shrink_kernel<T, kRows>, shape, p.stream, p, config.cluster,
                       is_multiple(p.x, p.x_stride, 8, 16) && p.in_features % 8 == 0,
                       is_multiple(p.a, p.num_slices, 8, 16) && p.in_features % 8 == 0);
}

}  // namespace

int shrink(const ShrinkParams& p) {
  const auto stream = static_cast<cudaStream_t>(p.stream);
  if (p.fill) {
    const cudaError_t error = cudaMemset2DAsync(
        p.xa, p.xa_stride * 4, 0, int64_t{p.num_slices} * p.max_rank * 4, p.num_tokens, stream);
    if (error != cudaSuccess) {
      return error;
    }
  }
  if (p.dtype == DType::kFloat32) {
    shrink_float_kernel<<<static_cast<unsigned>(p.num_tokens), kThreads, 0, stream>>>(p);
    return cudaGetLastError();
  }
  const DeviceProperties device = device_properties();
  ShrinkShape shape{};
  shape.num_tokens = p.num_tokens;
  shape.num_slots = p.plan.num_slots;
  shape.in_features = p.in_features;
  shape.rows = p.num_slices * p.max_rank;
  shape.sm_count = device.sm_count;
  shape.clusters = device.clusters;
  const ShrinkConfig config = shrink_config(shape);
  return dispatch_half(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    switch (config.rows) {
      case 32:
        return launch_shrink<T, 32>(p, config);
      case 64:
        return launch_shrink<T, 64>(p, config);
      case 128:
        return launch_shrink<T, 128>(p, config);
      default:
        return launch_shrink<T, 256>(p, config);
    }
  });
}

}  // namespace lora_ext::cuda
