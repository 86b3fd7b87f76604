// The adapters' side of linear_wgmma: the helpers' warps find the batch's slots and add up xa, and
// a step of ranks becomes products on the sums of W.
#pragma once

#include "common/vec.cuh"
#include "kernels/linear_wgmma_shared.cuh"

namespace lora_ext::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// By the helpers: the batch's slots, and of each the groups of tokens.
template <typename Traits>
__device__ __forceinline__ void find_entries(const DecodeBatch& p, typename Traits::Shared& shared,
                                             int thread) {
  for (int i = thread; i < Traits::kTokens; i += kLinearHelpers) {
    shared.token_entry[i] = -1;
    shared.entry[i].groups = 0;
  }
  if (thread < 32) {
    int entries = 0, quads = 0, last = -1;
    const int tiles = min(p.tile_capacity, Traits::kTokens);
#pragma unroll 1
    for (int first = 0; first < tiles; first += 32) {
      const int tile = first + thread;
      const int4 raw = __ldcg(reinterpret_cast<const int4*>(p.tiles + min(tile, tiles - 1)));
      const bool exists = tile < tiles && raw.x >= 0;
      const int slot = exists ? raw.x : -1;
      const int rank = exists ? min(__ldcg(p.ranks + slot), p.max_rank) : 0;
      int before = __shfl_up_sync(0xffffffffu, slot, 1);
      before = thread == 0 ? last : before;
      const bool begins = rank > 0 && slot != before;
      const unsigned beginners = __ballot_sync(0xffffffffu, begins);
      const int at = entries + __popc(beginners & ((2u << thread) - 1)) - 1;
      if (begins) {
        shared.entry[at].slot = slot;
        shared.entry[at].rank = rank;
      }
      const int own = rank > 0 ? (raw.z + 3) / 4 : 0;
      int upto = own;
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, upto, d);
        upto += thread >= d ? other : 0;
      }
      // More than the CTA has room for are those of a plan for more tokens than this call has.
      for (int i = 0; i < own; ++i) {
        const int quad = quads + upto - own + i;
        if (quad < Traits::kTokens) {
          shared.quad[quad] = {tile, i, at};
          // Where the permutation has them, for now.
          shared.quad_token[quad][0] = raw.y + 4 * i;
          shared.quad_token[quad][1] = raw.y + raw.z;
        }
      }
      entries += __popc(beginners);
      quads += __shfl_sync(0xffffffffu, upto, 31);
      last = __shfl_sync(0xffffffffu, slot, 31);
      if (last < 0) {
        break;
      }
    }
    if (thread == 0) {
      shared.entries = entries;
      shared.quads = min(quads, Traits::kTokens);
    }
  }
  device::cta_barrier_sync(kHelpers, kLinearHelpers);
  for (int i = thread; i < shared.quads; i += kLinearHelpers) {
    const int at = shared.quad_token[i][0], end = shared.quad_token[i][1],
              entry = shared.quad[i].entry;
    int tokens[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      tokens[e] = at + e < end ? __ldcg(p.permutation + at + e) : -1;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int token = tokens[e] < p.num_tokens ? tokens[e] : -1;
      shared.quad_token[i][e] = token;
      if (token >= 0) {
        shared.token_entry[token] = entry;
        atomicOr(&shared.entry[entry].groups, 1u << token / 8);
      }
    }
  }
  device::cta_barrier_sync(kHelpers, kLinearHelpers);
}

// xa of a slice for the groups of tokens that the CTA has, from the parts of the shrink:
// [token][ranks], zeros up to whole steps of 16.
template <typename Traits>
__device__ __forceinline__ void add_up_slice(const DecodeBatch& p, typename Traits::Shared& shared,
                                             int slice, uint32_t own, int splits, int thread) {
  constexpr int kParts = 8;
  const int64_t stride = int64_t{p.num_slices} * p.max_rank * kTileTokens;
  const int xa_stride = Traits::xa_stride(p.max_rank);
  const int ranks = (p.max_rank + 15) / 16 * 16, items = shared.quads * ranks;
  int quad = small_quotient(thread, ranks), j = thread - quad * ranks;
  const auto advance = [&] {
    for (j += kLinearHelpers; j >= ranks; j -= ranks) {
      ++quad;
    }
  };
#pragma unroll 1
  for (int i = thread; i < items; i += kLinearHelpers, advance()) {
    const auto at = shared.quad[quad];
    const int4 tokens = *reinterpret_cast<const int4*>(shared.quad_token[quad]);
    const int token[4] = {tokens.x, tokens.y, tokens.z, tokens.w};
    const auto has = [&](int e) { return token[e] >= 0 && (own >> token[e] / 8 & 1) != 0; };
    if (!has(0) && !has(1) && !has(2) && !has(3)) {
      continue;
    }
    const int rank = shared.entry[at.entry].rank;
    float4 sum = make_float4(0, 0, 0, 0);
    if (j < rank) {
      const float scaling = __ldcg(p.scalings + shared.entry[at.entry].slot);
      const float* from =
          p.partial + at.tile * splits * stride + (slice * rank + j) * kTileTokens + 4 * at.quarter;
      for (int c = 0; c < splits; c += kParts) {
        float4 parts[kParts];
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
          parts[k] =
              __ldcg(reinterpret_cast<const float4*>(from + min(c + k, splits - 1) * stride));
        }
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
          if (c + k < splits) {
            sum.x += parts[k].x, sum.y += parts[k].y, sum.z += parts[k].z, sum.w += parts[k].w;
          }
        }
      }
      sum.x *= scaling, sum.y *= scaling, sum.z *= scaling, sum.w *= scaling;
    }
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (has(e)) {
        shared.xa[token[e] * xa_stride + j] = values[e];
      }
    }
  }
}

template <typename T, typename Traits>
__device__ __forceinline__ void help(const LinearWgmmaParams& p, typename Traits::Shared& shared,
                                     const LinearPart& part, int thread) {
  device::grid_dependency_wait();
  find_entries<Traits>(p.batch, shared, thread);
  if (thread % 32 == 0) {
    device::barrier_arrive(&shared.found);
  }
  const int splits = p.batch.split_rules.parts(__ldcg(p.batch.header + kNumTiles));
  uint32_t turn = 1;
  for (int slice = 0; slice < p.batch.num_slices && shared.entries > 0; ++slice) {
    if (!part.has(p, slice)) {
      continue;
    }
    device::barrier_wait(&shared.xa_empty, turn);
    turn ^= 1;
    add_up_slice<Traits>(p.batch, shared, slice, part.groups<Traits::kGroups>(), splits, thread);
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
  uint32_t a[2][4];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint2 words = *reinterpret_cast<const uint2*>(b + h * eight_rows);
    // What lies behind the rank must not count, whatever it is.
    const int valid = has_row[h] ? rank - first - 4 * q : 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      a[e / 2][h + e % 2 * 2] =
          e < valid ? __float_as_uint(device::unpack<T>(e < 2 ? words.x : words.y, e % 2)) : 0u;
    }
  }
  const float* const xa = shared.xa + g * xa_stride + first + 4 * q;
#pragma unroll
  for (int j = 0; j < Traits::kGroups; ++j) {
    if (groups >> j & 1) {
      const float4 values = *reinterpret_cast<const float4*>(xa + 8 * j * xa_stride);
      const float ranks[4] = {values.x, values.y, values.z, values.w};
      float d[4] = {}, e[4] = {};
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        uint32_t high[2], low[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float value = ranks[2 * s + i];
          high[i] = __float_as_uint(value) & 0xffffe000u;
          low[i] = __float_as_uint(value - __uint_as_float(high[i]));
        }
        device::mma_tf32(d, a[s], high);
        device::mma_tf32(e, a[s], low);
      }
      // The group's other tokens must not have it, not even as a product with 0: what an adapter
      // has that is not finite stays with its own tokens.
      const int2 of = *reinterpret_cast<const int2*>(&shared.token_entry[8 * j + 2 * q]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if ((i % 2 == 0 ? of.x : of.y) == entry) {
          sums[4 * j + i] += d[i] + e[i];
        }
      }
    }
  }
}
#endif

}  // namespace lora_ext::cuda
