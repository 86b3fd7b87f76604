// y += scaling * A[ids] B^T for up to 64 tokens: what counts is how many reads wait for each other,
// but a weight should be read once for all tokens of a slot.
//
// A lane looks at one token of 32, so a warp finds those of a slot without the plan's tiles, and
// all else is asked for at once behind that. It serves them 16 at a time, and 64 columns, by
// mma.sync: the weights are its 16-row operand, the tokens its 8-column one, and the rows of its
// blocks are dealt so that a lane's results are neighbours in y. What a lane loads is what it
// multiplies, so no warp waits for another one.
#pragma once

#include "kernels/embedding_column.cuh"

namespace lora_ext::cuda {

constexpr int kSlotsTokens = 32, kSlotsWarps = 2, kSlotsThreads = 32 * kSlotsWarps;
constexpr int kSlotsGroups = 2;  // of eight tokens, at a time

// The tokens of one slot among those of a warp's lanes, a bit each.
struct SlotTokens {
  int slot;  // -1: none
  unsigned lanes;
};

// Those of the slot that is number `turn` by its first token.
__device__ __forceinline__ SlotTokens find_slot(int own_slot, int num_slots, int turn) {
  constexpr unsigned kAll = 0xffffffffu;
  const unsigned before = (1u << (threadIdx.x % 32)) - 1;
  const unsigned same = __match_any_sync(kAll, own_slot);
  const bool leads = own_slot >= 0 && own_slot < num_slots && (same & before) == 0;
  const unsigned leaders = __ballot_sync(kAll, leads);
  const unsigned of_turn = __ballot_sync(kAll, leads && __popc(leaders & before) == turn);
  const int from = (__ffs(static_cast<int>(of_turn)) - 1) & 31;
  const int slot = __shfl_sync(kAll, own_slot, from);
  const unsigned lanes = __shfl_sync(kAll, same, from);
  return {of_turn != 0 ? slot : -1, lanes};
}

// Neighbouring columns of y of one token: one access.
template <typename T, int kCount>
struct Neighbours {
  device::Chunk<T, kCount> values;

  __device__ __forceinline__ void load(const T* from) {
    if constexpr (kCount == 8) {
      const uint4 raw = __ldcg(reinterpret_cast<const uint4*>(from));
      values = {{raw.x, raw.y, raw.z, raw.w}};
    } else {
      const uint2 raw = __ldcg(reinterpret_cast<const uint2*>(from));
      values = {{raw.x, raw.y}};
    }
  }
  __device__ __forceinline__ void store(T* to) const {
    if constexpr (kCount == 8) {
      *reinterpret_cast<uint4*>(to) =
          make_uint4(values.words[0], values.words[1], values.words[2], values.words[3]);
    } else {
      *reinterpret_cast<uint2*>(to) = make_uint2(values.words[0], values.words[1]);
    }
  }
};

// A lane holds kSteps times kChunk neighbouring ranks of kRows rows of B: as many neighbouring
// columns of y. blockIdx.x: which 32 tokens, which of their slots, of which there may be
// p.groups, and which of p.blocks shares of the columns.
template <typename T, int kChunk, int kSteps, int kRows, bool kVector>
__global__ void __launch_bounds__(kSlotsThreads)
    embedding_slots_kernel(const __grid_constant__ EmbeddingJob p) {
  using Chunk = device::Chunk<T, kChunk>;
  constexpr int kWarpColumns = 8 * kRows, kSpan = 4 * kChunk, kBlocks = kRows / 2;
  __shared__ struct {
    Column<T> column;
    int token;
  } entries_of_warps[kSlotsWarps][kSlotsTokens];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  auto* const entries = entries_of_warps[warp];
  const int item = static_cast<int>(blockIdx.x) / p.blocks;
  const int block = static_cast<int>(blockIdx.x) - item * p.blocks;
  const int part = item / p.groups, turn = item - part * p.groups;
  const int own_token = part * kSlotsTokens + lane;
  const int first_column = (block * kSlotsWarps + warp) * kWarpColumns;
  {  // B to L2, of a slot that may be another one by the time it is read
    const int own_slot = own_token < p.num_tokens ? __ldcg(p.token_slots + own_token) : -1;
    const int slot = find_slot(own_slot, p.num_slots, turn).slot;
#pragma unroll
    for (int i = 0; i < kWarpColumns; i += 32) {
      prefetch_row<T, kSteps * kSpan>(p, slot, first_column + i + lane);
    }
  }
  device::grid_dependency_wait();
  device::grid_dependency_launch();
  const int own_slot = own_token < p.num_tokens ? __ldca(p.token_slots + own_token) : -1;
  const int64_t id = own_token < p.num_tokens ? read_id(p, own_token) : 0;
  const SlotTokens found = find_slot(own_slot, p.num_slots, turn);
  if (found.slot < 0) {
    return;
  }
  const int slot = found.slot, count = __popc(found.lanes);
  const int rank = min(p.ranks[slot], p.max_rank);
  const float scaling = p.scalings[slot];
  const int column = first_column + kRows * g;
  const bool has_columns = column < p.columns;
  const T* const b =
      static_cast<const T*>(p.b) + slot * p.b_slot_stride + column * p.b_row_stride + q * kChunk;
  Chunk weights[kSteps][kRows];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      device::load_vector(weights[step][i], b + i * p.b_row_stride + step * kSpan,
                          has_columns && step * kSpan + q * kChunk < p.max_rank);
    }
  }
  if (found.lanes >> lane & 1) {
    const int entry = __popc(found.lanes & ((1u << lane) - 1));
    entries[entry] = {find_column<T>(p, id, slot), own_token};
  }
  __syncwarp();
  Chunk next_tokens[kSlotsGroups][kSteps];
  // Of tokens 2 q and 2 q + 1 of each group.
  constexpr int kOutputs = 2 * kSlotsGroups;
  Neighbours<T, kRows> next_y[kOutputs];
  T* next_to[kOutputs];
  const auto load = [&](int first) {
#pragma unroll
    for (int n = 0; n < kSlotsGroups; ++n) {
      const int entry = first + 8 * n + g;
      const Column<T> of_token = entry < count ? entries[entry].column : Column<T>{};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int j = step * kSpan + q * kChunk;
        if constexpr (kVector) {
          device::load_vector(next_tokens[n][step], of_token.first + j,
                              of_token.first != nullptr && j < p.max_rank);
        } else {
          next_tokens[n][step] = of_token.template load<kChunk>(j, p.max_rank);
        }
      }
    }
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      const int entry = first + o / 2 * 8 + 2 * q + o % 2;
      next_to[o] = nullptr;
      if (has_columns && entry < count) {
        next_to[o] = static_cast<T*>(p.y) + entries[entry].token * p.y_stride + column;
        next_y[o].load(next_to[o]);
      }
    }
  };
  load(0);
  if (rank <= 0) {
    return;
  }
  uint32_t exists[kSteps][kChunk / 2];  // behind the rank there may be anything
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int w = 0; w < kChunk / 2; ++w) {
      exists[step][w] = existing_pair(rank - step * kSpan - q * kChunk - 2 * w);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        weights[step][i].words[w] &= exists[step][w];
      }
    }
  }
#pragma unroll 1
  for (int first = 0; first < count; first += 8 * kSlotsGroups) {
    Chunk tokens[kSlotsGroups][kSteps];
    Neighbours<T, kRows> y[kOutputs];
    T* to[kOutputs];
#pragma unroll
    for (int n = 0; n < kSlotsGroups; ++n) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int w = 0; w < kChunk / 2; ++w) {
          tokens[n][step].words[w] = next_tokens[n][step].words[w] & exists[step][w];
        }
      }
    }
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      y[o] = next_y[o], to[o] = next_to[o];
    }
    if (first + 8 * kSlotsGroups < count) {
      load(first + 8 * kSlotsGroups);
    }
#pragma unroll
    for (int n = 0; n < kSlotsGroups; ++n) {
      if (first + 8 * n >= count) {
        break;
      }
      float acc[kBlocks][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int w = 0; w < kChunk / 2; w += 2) {
#pragma unroll
          for (int i = 0; i < kBlocks; ++i) {
            const Chunk& upper = weights[step][2 * i];
            const Chunk& lower = weights[step][2 * i + 1];
            device::mma<T>(acc[i], upper.words[w], lower.words[w], upper.words[w + 1],
                           lower.words[w + 1], tokens[n][step].words[w],
                           tokens[n][step].words[w + 1]);
          }
        }
      }
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        T* const at = to[2 * n + o];
        if (at != nullptr) {
          Neighbours<T, kRows>& sum = y[2 * n + o];
#pragma unroll
          for (int i = 0; i < kBlocks; ++i) {
            uint32_t& word = sum.values.words[i];
            word = device::pack<T>(device::unpack<T>(word, 0) + scaling * acc[i][o],
                                   device::unpack<T>(word, 1) + scaling * acc[i][2 + o]);
          }
          sum.store(at);
        }
      }
    }
  }
}

}  // namespace lora_ext::cuda
