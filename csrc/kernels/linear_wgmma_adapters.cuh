// The adapters' side of linear_wgmma: the helpers' warps find the batch's slots and add up xa, and
// a step of ranks becomes products on the sums of W.
#pragma once

#include "common/vec.cuh"
#include "kernels/linear_ranks.cuh"
#include "kernels/linear_wgmma_shared.cuh"

namespace lora_ext::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// By the helpers: the batch's slots, of each the groups of tokens, and where xa of the CTA's own
// tokens comes from.
template <typename Traits>
__device__ __forceinline__ void find_entries(const DecodeBatch& p, typename Traits::Shared& shared,
                                             uint32_t own, int thread) {
  for (int i = thread; i < Traits::kTokens; i += kLinearHelpers) {
    shared.token_entry[i] = -1;
    shared.entry[i].groups = 0;
  }
  if (thread == 0) {
    shared.num_own_tokens = 0;
  }
  // Lane i of the first warp has tile i; those that are more belong to a plan for more tokens.
  static_assert(Traits::kTokens <= 32);
  constexpr int kTokensAtOnce = 4;
  int4 tile = {};
  int at = 0;
  if (thread < 32) {
    tile =
        read_plan<true>(reinterpret_cast<const int4*>(p.tiles + min(thread, p.tile_capacity - 1)));
    const int slot = thread < min(p.tile_capacity, Traits::kTokens) ? tile.x : -1;
    const int rank = slot >= 0 ? min(read_plan<true>(p.ranks + slot), p.max_rank) : 0;
    const float scaling = slot >= 0 ? read_plan<true>(p.scalings + slot) : 0.0f;
    const int before = __shfl_up_sync(0xffffffffu, slot, 1);
    const bool begins = rank > 0 && (thread == 0 || slot != before);
    const unsigned beginners = __ballot_sync(0xffffffffu, begins);
    at = __popc(beginners & ((2u << thread) - 1)) - 1;
    if (begins) {
      shared.entry[at].slot = slot;
      shared.entry[at].rank = rank;
      shared.entry[at].scaling = scaling;
    }
    if (thread == 0) {
      shared.entries = __popc(beginners);
    }
    tile.z = rank > 0 ? tile.z : 0;
  }
  device::cta_barrier_sync(kHelpers, kLinearHelpers);
  for (int place = 0; place < tile.z; place += kTokensAtOnce) {
    int tokens[kTokensAtOnce], count = 0;
#pragma unroll
    for (int e = 0; e < kTokensAtOnce; ++e) {
      const int index = tile.y + place + e;
      const bool exists = place + e < tile.z && index < p.max_tokens;
      tokens[e] = exists ? read_plan<true>(p.permutation + index) : -1;
    }
#pragma unroll
    for (int e = 0; e < kTokensAtOnce; ++e) {
      const bool is_own =
          tokens[e] >= 0 && tokens[e] < p.num_tokens && (own >> tokens[e] / 8 & 1) != 0;
      tokens[e] = is_own ? tokens[e] : -1;
      count += is_own ? 1 : 0;
    }
    // In any order: a token's sums are its own.
    int to = count > 0 ? atomicAdd(&shared.num_own_tokens, count) : 0;
#pragma unroll
    for (int e = 0; e < kTokensAtOnce; ++e) {
      if (tokens[e] >= 0) {
        shared.own_tokens[to++] = {tokens[e], thread, place + e, at};
        shared.token_entry[tokens[e]] = at;
        atomicOr(&shared.entry[at].groups, 1u << tokens[e] / 8);
      }
    }
  }
  device::cta_barrier_sync(kHelpers, kLinearHelpers);
}

// xa of a slice for the CTA's own tokens, from the parts of the shrink, zeros up to whole steps of
// 16 ranks. Tokens of one tile are neighbours there: so are the lanes that have them.
template <typename T, typename Traits>
__device__ __forceinline__ void add_up_slice(const DecodeBatch& p, typename Traits::Shared& shared,
                                             int slice, const TileCuts& cuts, int thread) {
  constexpr int kAtOnce = 3;  // values of a thread
  const int xa_stride = Traits::xa_stride(p.max_rank), tokens = shared.num_own_tokens;
  const int ranks = (p.max_rank + 15) / 16 * 16, values = tokens * ranks;
#pragma unroll 1
  for (int i = thread; i < values; i += kAtOnce * kLinearHelpers) {
    const float* from[kAtOnce];
    float scaling[kAtOnce], sum[kAtOnce] = {};
    int token[kAtOnce], rank[kAtOnce], pieces[kAtOnce], stride[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int at = i + u * kLinearHelpers;
      rank[u] = small_quotient(at, tokens);
      const auto item = shared.own_tokens[at - rank[u] * tokens];
      const int rank_of_slot = shared.entry[item.entry].rank;
      const TileShares shares = tile_shares(p, rank_of_slot, cuts.parts(item.tile));
      from[u] = partial_products(p, cuts.first_part(item.tile)) +
                (slice * rank_of_slot + rank[u]) * kTileTokens + item.place;
      token[u] = item.token;
      pieces[u] = rank[u] < rank_of_slot ? shares.pieces : 0, stride[u] = shares.stride;
      scaling[u] = shared.entry[item.entry].scaling;
    }
    add_up_parts(from, pieces, stride, sum);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (rank[u] < ranks) {
        store_rank<T>(shared.xa + token[u] * xa_stride, rank[u],
                      pieces[u] > 0 ? sum[u] * scaling[u] : 0.0f);
      }
    }
  }
}

// The shrink, which is the kernel before, has waited for all before it, so that all but its sums
// may be read at once.
template <typename T, typename Traits>
__device__ __forceinline__ void help(const LinearWgmmaParams& p, typename Traits::Shared& shared,
                                     const LinearPart& part, int thread) {
  const uint32_t own = part.groups<Traits::kGroups>();
  find_entries<Traits>(p.batch, shared, own, thread);
  if (thread % 32 == 0) {
    device::barrier_arrive(&shared.found);
  }
  const TileCuts cuts = p.batch.split_rules.cuts(read_num_tiles(p.batch));
  device::grid_dependency_wait();
  uint32_t turn = 1;
  for (int slice = 0; slice < p.batch.num_slices && shared.entries > 0; ++slice) {
    if (!part.has(p, slice)) {
      continue;
    }
    device::barrier_wait(&shared.xa_empty, turn);
    turn ^= 1;
    add_up_slice<T, Traits>(p.batch, shared, slice, cuts, thread);
    __syncwarp();
    if (thread % 32 == 0) {
      device::barrier_arrive(&shared.xa_full);
    }
  }
}

// What a step of 16 ranks of a slot adds to a warp's 16 rows of W. `b`: the lane's four ranks of
// row g, as they were copied.
template <typename T, typename Traits>
__device__ __forceinline__ void add_ranks(const typename Traits::Shared& shared, int entry,
                                          int first, int rank, uint32_t groups,
                                          const unsigned char* b, int eight_rows,
                                          const bool (&has_row)[2], int xa_stride,
                                          float (&sums)[Traits::kTokens / 2]) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  // Rows g and g + 8; of a row ranks 0 and 1, then 2 and 3, of the lane's.
  uint32_t rows[2][2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint2 words = *reinterpret_cast<const uint2*>(b + h * eight_rows);
    // What lies behind the rank must not count, whatever it is.
    const int valid = has_row[h] ? rank - first - 4 * q : 0;
    rows[h][0] = valid >= 2 ? words.x : valid == 1 ? words.x & 0xffff : 0;
    rows[h][1] = valid >= 4 ? words.y : valid == 3 ? words.y & 0xffff : 0;
  }
  const float* const xa = shared.xa + g * xa_stride + first + 4 * q;
#pragma unroll
  for (int j = 0; j < Traits::kGroups; ++j) {
    if (groups >> j & 1) {
      const uint4 values = *reinterpret_cast<const uint4*>(xa + 8 * j * xa_stride);
      float d[4] = {};
      multiply_ranks<T>(d, rows, values);
      // The group's other tokens must not have it, not even as a product with 0: what an adapter
      // has that is not finite stays with its own tokens.
      const int2 of = *reinterpret_cast<const int2*>(&shared.token_entry[8 * j + 2 * q]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if ((i % 2 == 0 ? of.x : of.y) == entry) {
          sums[4 * j + i] += d[i];
        }
      }
    }
  }
}
#endif

}  // namespace lora_ext::cuda
