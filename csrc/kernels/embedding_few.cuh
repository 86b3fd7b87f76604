// y += scaling * A[ids] B^T for few tokens: what counts is how many reads wait for each other.
//
// A CTA serves a token and 64 columns, by ordinary arithmetic, since a product by the tensor cores
// would want tokens of one slot side by side. So a CTA needs nothing of the plan but the slot of
// its token, which comes with the token's id and y, and all else comes behind that at once.
#pragma once

#include "kernels/embedding_column.cuh"

namespace lora_ext::cuda {

constexpr int kFewThreads = 128, kFewColumns = 64;

// kLanes: that share a row of B, eight ranks each. A warp takes 16 columns: in each round those of
// its groups of lanes, and at the end a lane the column of the round of its number.
template <typename T, int kLanes, bool kVector>
__global__ void __launch_bounds__(kFewThreads)
    embedding_few_kernel(const __grid_constant__ EmbeddingJob p) {
  constexpr int kGroups = 32 / kLanes, kRounds = 16 / kGroups;
  using Chunk = device::Chunk<T, 8>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int own = lane % kLanes, j = 8 * own;
  const int token = static_cast<int>(blockIdx.x) / p.blocks;
  const int block = static_cast<int>(blockIdx.x) - token * p.blocks;
  const int first = block * kFewColumns + 16 * warp + lane / kLanes;
  const int last = p.columns - 1;
  if (threadIdx.x < kFewColumns) {
    prefetch_row<T, 8 * kLanes>(p, __ldcg(p.token_slots + token),
                                block * kFewColumns + threadIdx.x);
  }
  device::grid_dependency_wait();
  device::grid_dependency_launch();
  const int column = first + own * kGroups;
  const bool writes = own < kRounds && column <= last;
  T* const y = static_cast<T*>(p.y) + token * p.y_stride + column;
  const int slot = __ldca(p.token_slots + token);
  const int64_t id = read_id(p, token);
  const unsigned short before =
      writes ? __ldcg(reinterpret_cast<const unsigned short*>(y)) : static_cast<unsigned short>(0);
  if (slot < 0) {
    return;
  }
  const int rank = min(p.ranks[slot], p.max_rank);
  const float scaling = p.scalings[slot];
  const bool reads = j < p.max_rank;
  Chunk a;
  const Column<T> a_column = find_column<T>(p, id, slot);
  if constexpr (kVector) {
    device::load_vector(a, a_column.first + j, a_column.first != nullptr && reads);
  } else {
    a = a_column.template load<8>(j, p.max_rank);
  }
  const T* b = static_cast<const T*>(p.b) + slot * p.b_slot_stride + j;
  Chunk rows[kRounds];
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    device::load_vector(rows[i], b + min(first + i * kGroups, last) * p.b_row_stride, reads);
  }
  if (rank <= 0) {
    return;
  }
  uint32_t exists[4];  // behind the rank there may be anything
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    exists[w] = existing_pair(rank - j - 2 * w);
    a.words[w] &= exists[w];
  }
  float result = 0.0f;
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t pair = rows[i].words[w] & exists[w];
      sum = fmaf(device::unpack<T>(a.words[w], 0), device::unpack<T>(pair, 0), sum);
      sum = fmaf(device::unpack<T>(a.words[w], 1), device::unpack<T>(pair, 1), sum);
    }
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    result = own == i ? sum : result;
  }
  if (writes) {
    *y = device::from_float<T>(device::unpack<T>(before, 0) + scaling * result);
  }
}

}  // namespace lora_ext::cuda
