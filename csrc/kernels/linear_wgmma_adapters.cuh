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
    shared.quads = 0;
  }
  // Lane i of the first warp has tile i; those that are more belong to a plan for more tokens.
  static_assert(Traits::kTokens <= 32);
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
  for (int quarter = 0; 4 * quarter < tile.z; ++quarter) {
    int tokens[4];
    bool has = false;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int entry = 4 * quarter + e;
      tokens[e] = entry < tile.z && tile.y + entry < p.max_tokens
                      ? read_plan<true>(p.permutation + tile.y + entry)
                      : -1;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int token = tokens[e] < p.num_tokens ? tokens[e] : -1;
      const bool is_own = token >= 0 && (own >> token / 8 & 1) != 0;
      tokens[e] = is_own ? token : -1;
      has |= is_own;
      if (is_own) {
        shared.token_entry[token] = at;
        atomicOr(&shared.entry[at].groups, 1u << token / 8);
      }
    }
    if (has) {  // in any order: each quad's sums are its own
      const int quad = atomicAdd(&shared.quads, 1);
      shared.quad[quad] = {thread, quarter, at};
      *reinterpret_cast<int4*>(shared.quad_token[quad]) =
          make_int4(tokens[0], tokens[1], tokens[2], tokens[3]);
    }
  }
  device::cta_barrier_sync(kHelpers, kLinearHelpers);
}

// xa of a slice for the CTA's own tokens, from the parts of the shrink, zeros up to whole steps of
// 16 ranks.
template <typename T, typename Traits>
__device__ __forceinline__ void add_up_slice(const DecodeBatch& p, typename Traits::Shared& shared,
                                             int slice, int parts_of_tile, int thread) {
  constexpr int kParts = 8;
  const int xa_stride = Traits::xa_stride(p.max_rank);
  const int ranks = (p.max_rank + 15) / 16 * 16, items = shared.quads * ranks;
#pragma unroll 1
  for (int i = thread; i < items; i += kLinearHelpers) {
    const int quad = small_quotient(i, ranks), j = i - quad * ranks;
    const auto at = shared.quad[quad];
    const int4 tokens = *reinterpret_cast<const int4*>(shared.quad_token[quad]);
    float4 sum = make_float4(0, 0, 0, 0);
    const int rank = shared.entry[at.entry].rank;
    if (j < rank) {
      const float scaling = shared.entry[at.entry].scaling;
      const TileShares shares = tile_shares(p, rank, parts_of_tile);
      const float* from = partial_products(p, at.tile, parts_of_tile) +
                          (slice * rank + j) * kTileTokens + 4 * at.quarter;
      for (int c = 0; c < shares.pieces; c += kParts) {
        float4 parts[kParts];
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
          parts[k] = __ldcg(reinterpret_cast<const float4*>(from + min(c + k, shares.pieces - 1) *
                                                                       shares.stride));
        }
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
          if (c + k < shares.pieces) {
            sum.x += parts[k].x, sum.y += parts[k].y, sum.z += parts[k].z, sum.w += parts[k].w;
          }
        }
      }
      sum.x *= scaling, sum.y *= scaling, sum.z *= scaling, sum.w *= scaling;
    }
    const int token[4] = {tokens.x, tokens.y, tokens.z, tokens.w};
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (token[e] >= 0) {
        store_rank<T>(shared.xa + token[e] * xa_stride, j, values[e]);
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
  const int parts = p.batch.split_rules.parts(read_num_tiles(p.batch));
  device::grid_dependency_wait();
  uint32_t turn = 1;
  for (int slice = 0; slice < p.batch.num_slices && shared.entries > 0; ++slice) {
    if (!part.has(p, slice)) {
      continue;
    }
    device::barrier_wait(&shared.xa_empty, turn);
    turn ^= 1;
    add_up_slice<T, Traits>(p.batch, shared, slice, parts, thread);
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
