// The decode shrink: a CTA serves a tile of up to 16 tokens of one slot, 16 or 32 rows of A (the
// rows of all slices in one range) and a part of K (see decode_tile.cuh).
#pragma once

#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "kernels/decode_tile.cuh"

namespace lora_ext::cuda {

constexpr int kShrinkWarps = kDecodeWarps;
constexpr int kShrinkThreads = 32 * kShrinkWarps;

struct alignas(64) DecodeShrinkParams {
  DecodeBatch batch;
  const void* x;
  int64_t x_stride;
  const int64_t* a_offsets;   // flat layout, else null
  int32_t prefetch_features;  // of a CTA's part of K, before the wait
  int32_t row_groups;         // CTAs that share a tile's rows of A
  bool one_range;             // row i * r + j of the first slice is row j of slice i
  bool vector_x;
  struct {
    const void* a;
    int64_t slot_stride, row_stride;
  } slices[kMaxSlices];
};
// The shrink's first look, which finds its tile's slot, rank and tokens with nothing to go by:
// where the batch and the pool are small it reads all tokens and ranks beside the tiles that may be
// its own, one round of loads in place of three. Cold, as they are behind a base layer, each would
// take most of a microsecond. The barrier is every thread's, whatever it read.
__device__ __forceinline__ DecodeTile find_tile(const DecodeBatch& p, int part, int& split_shift) {
  __shared__ int tokens[kShrinkThreads], ranks[kShrinkThreads];
  const int thread = threadIdx.x;
  if (p.max_tokens > kShrinkThreads || p.num_slots > kShrinkThreads) {
    split_shift = read_split_shift(p);
    return read_tile(p, part >> split_shift, 0, 0);
  }
  const int num_tiles = __ldcg(p.header + kNumTiles);
  int4 candidates[SplitLimits::kCount + 1];
#pragma unroll
  for (int shift = 0; shift <= SplitLimits::kCount; ++shift) {
    const int tile = min(part >> shift, p.tile_capacity - 1);
    candidates[shift] = __ldcg(reinterpret_cast<const int4*>(p.tiles + tile));
  }
  if (thread < p.max_tokens) {
    tokens[thread] = __ldcg(p.permutation + thread);
  }
  if (thread < p.num_slots) {
    ranks[thread] = __ldcg(p.ranks + thread);
  }
  __syncthreads();
  split_shift = p.split_limits.shift(num_tiles);
  int4 raw = candidates[0];
#pragma unroll
  for (int shift = 1; shift <= SplitLimits::kCount; ++shift) {
    raw = split_shift == shift ? candidates[shift] : raw;
  }
  if (raw.x < 0 || raw.x >= p.num_slots || (part >> split_shift) >= p.tile_capacity) {
    return {-1, 0, 0, 0, -1};
  }
  const int entry = thread % kTileTokens;
  const int token = tokens[min(max(raw.y + entry, 0), p.max_tokens - 1)];
  return {raw.x, raw.y, raw.z, min(ranks[raw.x], p.max_rank),
          entry < raw.z && token < p.num_tokens ? token : -1};
}

// Values k .. k + 8 of a row, those from `end` on as 0.
template <typename T, bool kVector>
__device__ __forceinline__ void load_chunk(device::Chunk<T, 8>& chunk, const T* row, int k, int end,
                                           bool exists) {
  if constexpr (kVector) {
    device::load_vector(chunk, row + k, exists && k < end);
  } else {
    device::load_scalars(chunk, row + k, exists ? end - k : 0);
  }
}

// kBlocks: blocks of 16 rows of A that a CTA computes.
template <int kBlocks>
struct DecodeShrinkTraits {
  static constexpr int kRows = 16 * kBlocks;
  // 32-wide K steps of a warp whose loads are in flight together: as many as registers hold.
  static constexpr int kSteps = kBlocks == 1 ? 5 : 3;
  static constexpr int kPartialStride = kTileTokens + 4;  // float2 stores hit distinct banks
  static constexpr int kSharedBytes = kShrinkWarps * kRows * kPartialStride * 4;
};

template <typename T>
__device__ __forceinline__ const T* shrink_row(const DecodeShrinkParams& p, int slot, int rank,
                                               int row) {
  const int slice = p.one_range ? 0 : row / rank;
  const auto& from = p.slices[slice];
  const int64_t start = p.a_offsets != nullptr ? p.a_offsets[slot] : slot * from.slot_stride;
  return static_cast<const T*>(from.a) + start + (row - slice * rank) * from.row_stride;
}

template <typename T, int kBlocks, bool kVector>
__device__ __forceinline__ void decode_shrink_body(const DecodeShrinkParams& p, const DecodeTile& t,
                                                   int group, int part, int split_shift,
                                                   float* shared) {
  using Traits = DecodeShrinkTraits<kBlocks>;
  constexpr int kSteps = Traits::kSteps, kRows = Traits::kRows;
  constexpr int kPartialStride = Traits::kPartialStride;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4,
            q = lane % 4;
  const int rows = t.rank * p.batch.num_slices, first_row = group * kRows;

  const T* a_rows[2 * kBlocks];
  bool has_row[2 * kBlocks];
#pragma unroll
  for (int i = 0; i < 2 * kBlocks; ++i) {
    const int row = first_row + 8 * i + g;
    has_row[i] = row < rows;
    a_rows[i] = shrink_row<T>(p, t.slot, t.rank, has_row[i] ? row : 0);
  }
  const T* x_rows[2];
  bool has_token[2];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int token = __shfl_sync(0xffffffffu, t.token, 8 * n + g);
    has_token[n] = token >= 0;
    x_rows[n] = static_cast<const T*>(p.x) + max(token, 0) * p.x_stride;
  }

  // Neighbouring warps take neighbouring 64-byte pieces of the same rows, so that DRAM sees long
  // runs.
  const int steps = (p.batch.in_features + 31) / 32, split = part & ((1 << split_shift) - 1);
  const int end = steps * (split + 1) >> split_shift;
  const int k_end = min(32 * end, p.batch.in_features);
  float acc[kBlocks][2][4] = {};
  // The bound is the warp's, not the lane's: mma needs all lanes.
  for (int step = (steps * split >> split_shift) + warp; step < end;
       step += kShrinkWarps * kSteps) {
    device::Chunk<T, 8> weights[kSteps][2 * kBlocks], tokens[kSteps][2];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int k = 32 * (step + s * kShrinkWarps) + 8 * q;
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i) {
        load_chunk<T, kVector>(weights[s][i], a_rows[i], k, k_end, has_row[i]);
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        load_chunk<T, kVector>(tokens[s][n], x_rows[n], k, k_end, has_token[n]);
      }
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int w = 0; w < 4; w += 2) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            if (n == 0 || t.count > 8) {
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

  // The warps' sums meet in shared memory, in fixed order.
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float* to =
            shared + (warp * kRows + 16 * block + 8 * h + g) * kPartialStride + 8 * n + 2 * q;
        *reinterpret_cast<float2*>(to) =
            make_float2(acc[block][n][2 * h], acc[block][n][2 * h + 1]);
      }
    }
  }
  __syncthreads();
  const int64_t stride = int64_t{p.batch.num_slices} * p.batch.max_rank;
  float* out = p.batch.partial + (part * stride + first_row) * kTileTokens;
  const int used = min(rows - first_row, kRows);
#pragma unroll
  for (int i = thread; i < kRows * kTileTokens / 4; i += kShrinkThreads) {
    const int row = i / (kTileTokens / 4), token = i % (kTileTokens / 4) * 4;
    if (row < used && token < t.count) {
      const float* from = shared + row * kPartialStride + token;
      float4 sum = *reinterpret_cast<const float4*>(from);
#pragma unroll
      for (int w = 1; w < kShrinkWarps; ++w) {
        const float4 next = *reinterpret_cast<const float4*>(from + w * kRows * kPartialStride);
        sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
      }
      *reinterpret_cast<float4*>(out + i * 4) = sum;
    }
  }
}

// kGeneral: a tile finds out for itself whether its rows allow vector accesses, as it must where
// only the device knows the offsets and ranks (flat layouts); else the launcher has made sure that
// they do.
template <typename T, int kBlocks, bool kGeneral>
__global__ void __launch_bounds__(kShrinkThreads, 2)
    decode_shrink_kernel(const __grid_constant__ DecodeShrinkParams p) {
  extern __shared__ __align__(128) float sums[];
  using Traits = DecodeShrinkTraits<kBlocks>;
  constexpr int kRows = Traits::kRows;
  // The kernel before this one may still be at work: what it writes must not be read, but what
  // will be read can be brought to L2. The plan may be among what it writes; as an address of a
  // prefetch, kept inside the tensors, the old one does no harm.
  // Row groups of a part are neighbours: so the CTAs that have work are the first ones of the grid,
  // which go to different SMs.
  const int part = blockIdx.x / p.row_groups, group = blockIdx.x % p.row_groups;
  int shift = 0;
  DecodeTile t = find_tile(p.batch, part, shift);
  if constexpr (!kGeneral) {
    if (t.slot >= 0 && t.slot < p.batch.num_slots) {
      const int steps = (p.batch.in_features + 31) / 32, split = part & ((1 << shift) - 1);
      const int k = 32 * (steps * split >> shift);
      const int bytes = 2 * min(min(32 * (steps * (split + 1) >> shift), p.batch.in_features) - k,
                                p.prefetch_features);
      const int row = group * kRows + threadIdx.x;
      if (threadIdx.x < kRows && row < t.rank * p.batch.num_slices) {
        device::prefetch_l2(shrink_row<T>(p, t.slot, t.rank, row) + k, bytes);
      } else if (threadIdx.x >= kShrinkThreads - kTileTokens && t.token >= 0) {
        device::prefetch_l2(static_cast<const T*>(p.x) + t.token * p.x_stride + k, bytes);
      }
    }
  }
  device::grid_dependency_wait();
  device::grid_dependency_launch();
  const int guess = shift;
  shift = read_split_shift(p.batch);
  t = read_tile(p.batch, part >> guess, t.slot, t.start);
  if (shift != guess) {
    t = read_tile(p.batch, part >> shift, 0, 0);
  }
  if (t.slot < 0 || group * kRows >= t.rank * p.batch.num_slices) {
    return;
  }
  bool vector = true;
  if constexpr (kGeneral) {
    vector = p.vector_x;
    for (int i = 0; i < p.batch.num_slices; ++i) {
      vector &= p.slices[i].row_stride % 8 == 0 &&
                device::is_aligned(shrink_row<T>(p, t.slot, t.rank, i * t.rank), 16);
    }
  }
  if (vector) {
    decode_shrink_body<T, kBlocks, true>(p, t, group, part, shift, sums);
  } else if constexpr (kGeneral) {
    decode_shrink_body<T, kBlocks, false>(p, t, group, part, shift, sums);
  }
}

}  // namespace lora_ext::cuda
