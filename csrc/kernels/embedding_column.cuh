// What the kernels of an embedding share: where a token's column of A lies, and what an apply is
// told.
#pragma once

#include "common/ptx.cuh"
#include "common/vec.cuh"

namespace lora_ext::cuda {

// What an apply in one kernel reads, and no more: the parameter bank is cold at every launch.
struct alignas(64) EmbeddingJob {
  const void *ids, *a, *extra_a, *b;
  void* y;
  const int32_t* ranks;
  const float* scalings;
  const int32_t *token_slots, *permutation;
  const Tile* tiles;  // wide ones
  int64_t a_slot_stride, a_rank_stride, a_vocab_stride;
  int64_t extra_slot_stride, extra_token_stride, num_extra;
  int64_t b_slot_stride, b_row_stride, y_stride;
  int64_t vocab_start, vocab_size;
  int32_t num_tokens, num_slots, max_tokens, max_rank;
  int32_t columns, blocks;  // of y; CTAs that share a token's or a tile's columns
  int32_t groups;           // of tokens, that there can be: tiles, or slots of 32 tokens
  bool ids_are_int64;
  bool looks_ahead;  // whether what the batch was before the wait is worth a look
};

// A mask of the first `count` halves of a word.
__device__ __forceinline__ uint32_t existing_pair(int count) {
  return count >= 2 ? 0xffffffffu : count == 1 ? 0xffffu : 0u;
}

// Where the elements of a token's column of A are; null where no adapter has this id.
template <typename T>
struct Column {
  const T* first;
  int64_t stride;

  // Ranks j and following, those from `rank` on 0, of a column in one piece, aligned; to shared
  // memory.
  template <int kCount>
  __device__ __forceinline__ void copy_async(device::Chunk<T, kCount>* to, int j, int rank) const {
    const int bytes = first != nullptr ? 2 * min(max(rank - j, 0), kCount) : 0;
    if constexpr (kCount == 8) {
      device::copy_async_16(to, first + j, bytes);
    } else {
      device::copy_async_8<false>(to, first + j, bytes);
    }
  }
  // The same of any column, to registers.
  template <int kCount>
  __device__ __forceinline__ device::Chunk<T, kCount> load(int j, int rank) const {
    device::Chunk<T, kCount> chunk;
    const int valid = first != nullptr ? rank - j : 0;
    T single[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      single[e] = e < valid ? first[(j + e) * stride] : T(0.0f);
    }
#pragma unroll
    for (int e = 0; e < kCount; e += 2) {
      chunk.words[e / 2] = device::pack_two(single[e], single[e + 1]);
    }
    return chunk;
  }
};

template <typename T, typename Params>
__device__ __forceinline__ Column<T> find_column(const Params& p, int64_t id, int slot) {
  const T* const known = static_cast<const T*>(p.a) + slot * p.a_slot_stride;
  const T* const extra = static_cast<const T*>(p.extra_a) + slot * p.extra_slot_stride;
  id -= p.vocab_start;
  const int64_t past = id - p.vocab_size;
  const bool is_known = id >= 0 && past < 0, is_extra = past >= 0 && past < p.num_extra;
  const int64_t offset = is_known ? id * p.a_vocab_stride : past * p.extra_token_stride;
  const T* const first = (is_known ? known : extra) + offset;
  return {is_known || is_extra ? first : nullptr, is_known ? p.a_rank_stride : 1};
}

// A row of B to L2, of a slot that may be another one by the time it is read. By lines, since lanes
// issue bulk prefetches one after the other (one token: 1.6 us so, 1.2 by lines).
// kRanks: that max_rank does not exceed.
template <typename T, int kRanks>
__device__ __forceinline__ void prefetch_row(const EmbeddingJob& p, int slot, int row) {
  if (slot >= 0 && slot < p.num_slots && row < p.columns) {
    const T* const from =
        static_cast<const T*>(p.b) + slot * p.b_slot_stride + row * p.b_row_stride;
#pragma unroll
    for (int j = 0; j < kRanks; j += 64) {
      device::prefetch_line(from + j);
    }
  }
}

template <typename Params>
__device__ __forceinline__ int64_t read_id(const Params& p, int64_t token) {
  return p.ids_are_int64 ? static_cast<const int64_t*>(p.ids)[token]
                         : static_cast<const int32_t*>(p.ids)[token];
}

}  // namespace lora_ext::cuda
