// xa = scaling * x A^T for tiles of up to 64 tokens of one slot.
//
// A CTA computes 64 tokens x up to 256 columns of xa, so that x is read once for all slices (three
// of rank 64 fit). x and A stream through shared memory in steps of 64 values of K, several steps
// ahead; four warps split the tokens, two the columns. Where tiles are few the CTAs of a cluster
// split K, and their sums meet in distributed shared memory in fixed order.
#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "kernels/kernels.h"
#include "kernels/launch.cuh"
#include "kernels/prefill_heuristics.h"
#include "kernels/wide_apply.h"

namespace lora_ext::cuda {
namespace {

constexpr int kThreads = 256;

// kRows: columns of xa (rows of A) that a CTA computes. A step of K is 256 bytes of a row where the
// stages stay small, which halves the barriers; three stages are in flight while one is computed.
template <int kRows>
struct ShrinkTraits {
  static constexpr int kStepK = kRows <= 64 ? 128 : 64;
  static constexpr int kChunks = kStepK / 8;  // of 16 bytes, a row
  static constexpr int kRowsPerRound =
      kThreads / kChunks;  // rows that the block copies with one copy a thread
  static constexpr int kStages = kRows == 64 ? 3 : 4;
  static constexpr int kStageBytes = (kWideTileTokens + kRows) * kStepK * 2;
  static constexpr int kSumStride = kRows + 4;  // floats between tokens of the partial sums
  static constexpr int kSumBytes = kWideTileTokens * kSumStride * 4;
  static constexpr int kSharedBytes =
      kStages * kStageBytes > kSumBytes ? kStages* kStageBytes : kSumBytes;

  // Where a chunk lies in a stage: rotated within the row so that the eight rows of an ldmatrix hit
  // distinct banks.
  __device__ static int at(int row, int chunk) {
    return (row * kChunks + (chunk ^ (row % 8))) * 16;
  }
};

template <typename T, int kRows, bool kVector>
__device__ __forceinline__ void shrink_body(const ShrinkParams& p, const Tile& tile, int rank,
                                            int cluster, unsigned char* shared) {
  using Traits = ShrinkTraits<kRows>;
  constexpr int kStages = Traits::kStages, kStepK = Traits::kStepK;
  constexpr int kLoadsX = kWideTileTokens / Traits::kRowsPerRound,
                kLoadsA = kRows / Traits::kRowsPerRound;
  constexpr int kBlocks = kRows / 2 / 8;  // 8-column blocks of a warp
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int member = blockIdx.x % cluster, first_column = blockIdx.y * kRows;
  const int columns = rank * p.num_slices;  // columns of xa in use

  const int in_features = static_cast<int>(p.in_features);
  const int steps = (in_features + kStepK - 1) / kStepK;
  const int step_begin = steps * member / cluster,
            num_steps = steps * (member + 1) / cluster - step_begin;

  // The rows that this thread copies are fixed over K: only a pointer moves.
  const int chunk = thread % Traits::kChunks, row = thread / Traits::kChunks;
  int k = step_begin * kStepK + chunk * 8;
  const T* x_rows[kLoadsX];
  bool has_x[kLoadsX];
#pragma unroll
  for (int i = 0; i < kLoadsX; ++i) {
    const int t = row + Traits::kRowsPerRound * i;
    const int64_t id = t < tile.count ? p.plan.permutation[tile.start + t] : p.num_tokens;
    has_x[i] = id < p.num_tokens;
    x_rows[i] = static_cast<const T*>(p.x) + (has_x[i] ? id * p.x_stride : 0) + k;
  }
  const T* a_rows[kLoadsA];
  bool has_a[kLoadsA];
#pragma unroll
  for (int i = 0; i < kLoadsA; ++i) {
    const int column = first_column + row + Traits::kRowsPerRound * i;
    has_a[i] = column < columns;
    const int slice = has_a[i] ? column / rank : 0;
    a_rows[i] = static_cast<const T*>(p.a.base[slice]) +
                p.a.row_offset(tile.slot, slice, rank, has_a[i] ? column % rank : 0) + k;
  }
  const auto copy = [&](unsigned char* to, const T* from, bool exists) {
    if constexpr (kVector) {  // a source size of 0 reads nothing and writes zeros
      device::copy_async_16(to, from, exists && k < in_features ? 16 : 0);
    } else {
      device::Chunk<T, 8> values;
      device::load_scalars(values, from, exists ? in_features - k : 0);
      *reinterpret_cast<device::Chunk<T, 8>*>(to) = values;
    }
  };
  int staged = 0;
  const auto stage = [&] {
    if (staged < num_steps) {
      unsigned char* x_stage = shared + staged % kStages * Traits::kStageBytes;
      unsigned char* a_stage = x_stage + kWideTileTokens * kStepK * 2;
#pragma unroll
      for (int i = 0; i < kLoadsX; ++i) {
        copy(x_stage + Traits::at(row + Traits::kRowsPerRound * i, chunk), x_rows[i], has_x[i]);
        x_rows[i] += kStepK;
      }
#pragma unroll
      for (int i = 0; i < kLoadsA; ++i) {
        copy(a_stage + Traits::at(row + Traits::kRowsPerRound * i, chunk), a_rows[i], has_a[i]);
        a_rows[i] += kStepK;
      }
      k += kStepK;
      ++staged;
    }
    device::copy_async_commit();
  };

  float acc[kBlocks][4] = {};
  const int warp_token = warp / 2 * 16, warp_column = warp % 2 * (kRows / 2);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    stage();
  }
  for (int step = 0; step < num_steps; ++step) {
    device::copy_async_wait<kStages - 2>();
    __syncthreads();  // this step's data are there, and every warp is done with the stage that is
                      // filled next
    stage();
    const unsigned char* x_stage = shared + step % kStages * Traits::kStageBytes;
    const unsigned char* a_stage = x_stage + kWideTileTokens * kStepK * 2;
    if (warp_token < tile.count && first_column + warp_column < columns) {
#pragma unroll
      for (int kk = 0; kk < kStepK / 16; ++kk) {
        uint32_t tokens[4];
        device::ldmatrix_x4(tokens,
                            x_stage + Traits::at(warp_token + lane % 16, kk * 2 + lane / 16));
#pragma unroll
        for (int n = 0; n < kBlocks; n += 2) {
          uint32_t weights[4];
          device::ldmatrix_x4(weights,
                              a_stage + Traits::at(warp_column + 8 * n + lane / 16 * 8 + lane % 8,
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
  const bool joined = cluster > 1;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (joined) {
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
  const float scaling = p.scalings[tile.slot];
  const int used = min(columns - first_column, kRows);
  constexpr int kQuads = kRows / 4;
  for (int i = thread; i < kWideTileTokens / cluster * kQuads; i += kThreads) {
    const int t = i / kQuads * cluster + member, column = i % kQuads * 4;
    const int64_t id =
        t < tile.count && column < used ? p.plan.permutation[tile.start + t] : p.num_tokens;
    if (id >= p.num_tokens) {
      continue;
    }
    const float* from = sums + t * Traits::kSumStride + column;
    float4 sum = make_float4(0, 0, 0, 0);
    if (!joined) {
      sum = *reinterpret_cast<const float4*>(from);
    }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (joined) {
#pragma unroll 8
      for (int c = 0; c < cluster; ++c) {
        const float4 next = device::load_peer(device::peer_address(from, c));
        sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
      }
    }
#endif
    float* to = static_cast<float*>(p.xa) + id * p.xa_stride + first_column + column;
    const float values[4] = {sum.x * scaling, sum.y * scaling, sum.z * scaling, sum.w * scaling};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (column + e < used) {
        to[e] = values[e];
      }
    }
  }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (joined) {
    device::cluster_arrive();  // peers may still be reading this CTA's sums
    device::cluster_wait();
  }
#endif
}

// kGeneral: a tile finds out for itself whether its rows allow 16-byte copies, as it must where
// only the device knows the offsets (flat layout); else the launcher has made sure that they do.
template <typename T, int kRows, bool kGeneral>
__global__ void __launch_bounds__(kThreads, kRows <= 128 ? 2 : 1)
    shrink_kernel(const __grid_constant__ ShrinkParams p, int cluster, bool vector_x) {
  extern __shared__ __align__(128) unsigned char shared[];
  device::grid_dependency_wait();
  device::grid_dependency_launch();
  const Tile tile = p.plan.wide_tiles[blockIdx.x / cluster];
  if (tile.slot < 0) {
    return;  // the whole cluster alike
  }
  const int rank = min(p.ranks[tile.slot], p.max_rank);
  if (rank <= 0 || blockIdx.y * kRows >= rank * p.num_slices) {
    return;
  }
  if constexpr (!kGeneral) {
    shrink_body<T, kRows, true>(p, tile, rank, cluster, shared);
  } else {
    bool vector = vector_x;
    for (int i = 0; i < p.num_slices; ++i) {
      vector &= p.a.row_stride[i] % 8 == 0 &&
                device::is_aligned(
                    static_cast<const T*>(p.a.base[i]) + p.a.row_offset(tile.slot, i, rank, 0), 16);
    }
    if (vector) {
      shrink_body<T, kRows, true>(p, tile, rank, cluster, shared);
    } else {
      shrink_body<T, kRows, false>(p, tile, rank, cluster, shared);
    }
  }
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
  const bool vector_x = is_multiple(p.x, p.x_stride, 8, 16) && p.in_features % 8 == 0;
  return launch_kernel(
      shrink_is_vector(p) ? shrink_kernel<T, kRows, false> : shrink_kernel<T, kRows, true>, shape,
      p.stream, p, config.cluster, vector_x);
}

}  // namespace

bool shrink_is_vector(const ShrinkParams& p) {
  return is_multiple(p.x, p.x_stride, 8, 16) && p.in_features % 8 == 0 &&
         p.a.slot_offsets == nullptr && is_multiple(p.a, p.num_slices, 8, 16);
}

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
  if (shrink_takes_wgmma(p)) {
    return shrink_wgmma(p);
  }
  const DeviceProperties device = device_properties();
  const ShrinkShape shape{p.num_tokens,    p.plan.num_slots,
                          p.in_features,   p.num_slices * p.max_rank,
                          device.sm_count, device.clusters};
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
