// xa = scaling * x A^T on sm_90a: tiles of up to 64 tokens of one slot by a warpgroup.
//
// A CTA computes 64 tokens x up to 192 columns of xa, so that x is read once for three slices of
// rank 64. One warp copies x and A to shared memory in boxes of 64 values of K, several steps
// ahead, and the warpgroup takes them from there (wgmma): mma.sync would read shared memory once
// for each of the four warps, and that was the limit. Where tiles are few the CTAs of a cluster
// split K; each pushes its sums to the one that the token belongs to, which adds them up in fixed
// order. Where they are many, the work is cut into equal parts across tiles (XaLayout), so that a
// batch of any number of tiles is one wave.
#pragma once

#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "common/wgmma.cuh"
#include "kernels/shrink_wgmma_copy.cuh"

namespace lora_ext::cuda {

// Four sums of a token, from `position` of its row on, as the expand's products take them: split
// into halves, and 0 behind the rank.
template <typename T>
__device__ __forceinline__ float4 split_sums(float4 sum, int position, int rank) {
  const int padded = XaLayout::padded(rank);
  const int j = XaLayout::column(position - small_quotient(position, padded) * padded);
  sum.x = j < rank ? sum.x : 0.0f, sum.y = j + 1 < rank ? sum.y : 0.0f;
  sum.z = j + 8 < rank ? sum.z : 0.0f, sum.w = j + 9 < rank ? sum.w : 0.0f;
  uint32_t high[2], low[2];
  device::split_two<T>(sum.x, sum.y, high[0], low[0]);
  device::split_two<T>(sum.z, sum.w, high[1], low[1]);
  return make_float4(__uint_as_float(high[0]), __uint_as_float(high[1]), __uint_as_float(low[0]),
                     __uint_as_float(low[1]));
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// sums[4 n + 2 h + e] is token 16 warp + 8 h + g, column 8 n + 2 q + e.
template <typename T, typename Traits>
__device__ __forceinline__ void multiply_piece(const ShrinkPiece& piece,
                                               float (&sums)[Traits::kRows / 2],
                                               StageRing<Traits>& ring) {
  constexpr int kRows = Traits::kRows;
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) {
    sums[i] = 0.0f;
  }
  uint64_t* used = nullptr;  // the barrier of the stage of the step before
#pragma unroll 1
  for (int step = 0; step < piece.steps; ++step) {
    device::barrier_wait(ring.full(), ring.turn);
    if (!piece.neighbours) {  // boxes need none, and it waits for all that is on its way
      device::fence_shared_for_products();
    }
    const uint64_t tokens = device::swizzled_tile(ring.data());
    const uint64_t weights = device::swizzled_tile(ring.data() + kBoxRowsX * 128);
    device::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kBoxK / 16; ++kk) {
      device::wgmma<T, kRows>(sums, tokens + 2 * kk, weights + 2 * kk);
    }
    device::wgmma_commit();
    device::wgmma_wait<1>();
    if (used != nullptr && threadIdx.x % 32 == 0) {
      device::barrier_arrive(used);
    }
    used = ring.empty();
    ring.advance();
  }
  device::wgmma_wait<0>();
  if (used != nullptr && threadIdx.x % 32 == 0) {
    device::barrier_arrive(used);
  }
}

// Four sums of a token, from `position` of its row on.
template <typename T, ShrinkWay kWay>
__device__ __forceinline__ void store_sums(const ShrinkParams& p, const ShrinkPiece& piece,
                                           int token, int position, float4 sum) {
  if (kWay == ShrinkWay::kClusters || p.layout.by_tile) {
    float* to = static_cast<float*>(p.xa) + (piece.first_row + token) * p.xa_stride + position;
    *reinterpret_cast<float4*>(to) =
        p.layout.halves ? split_sums<T>(sum, position, piece.rank) : sum;
    return;
  }
  const int64_t id = p.plan.permutation[piece.tile.start + token];
  if (id >= p.num_tokens) {
    return;
  }
  float* to = static_cast<float*>(p.xa) + id * p.xa_stride;
  const float values[4] = {sum.x, sum.y, sum.z, sum.w};
  const int padded = XaLayout::padded(piece.rank), slice = position / padded;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int j = XaLayout::column(position + e) - slice * padded;
    if (j < piece.rank) {
      to[slice * piece.rank + j] = values[e];
    }
  }
}

template <typename T, typename Traits, ShrinkWay kWay>
__device__ __forceinline__ void shrink_wgmma_piece(const ShrinkWork& work, const ShrinkMaps& maps,
                                                   const ShrinkPiece& piece,
                                                   const ShrinkGroup& group, uint32_t& sums_turn,
                                                   StageRing<Traits>& ring) {
  constexpr int kRows = Traits::kRows;
  const ShrinkParams& p = work.p;
  const int first_column = blockIdx.y * kRows, cluster = group.size, member = group.member;
  const bool multiplies = threadIdx.x < kWarpgroup;
  float sums[kRows / 2];
  if (multiplies) {
    multiply_piece<T, Traits>(piece, sums, ring);
  } else {
    copy_piece<T, Traits, kWay>(work, maps, piece, first_column, ring);
  }
  const float scaling = p.scalings[piece.tile.slot];
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int first_token = threadIdx.x / 32 * 16 + g;  // and 8 further on
  if constexpr (kWay == ShrinkWay::kParts) {
    if (multiplies) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int token = first_token + 8 * h;
        float* to = static_cast<float*>(p.xa) + (piece.first_row + token) * p.xa_stride +
                    first_column + 4 * q;
#pragma unroll
        for (int m = 0; m < kRows / 16; ++m) {
          const float* sum = sums + 8 * m + 2 * h;
          if (token < piece.tile.count && 16 * m < piece.columns) {
            *reinterpret_cast<float4*>(to + 16 * m) =
                make_float4(sum[0] * scaling, sum[1] * scaling, sum[4] * scaling, sum[5] * scaling);
          }
        }
      }
    }
    return;
  }
  // Alone it needs no other's sums, but the rows of a plain xa are put together the same way.
  // Without a cluster there is no pushing: st.async is for launches that have one.
  const bool alone = kWay == ShrinkWay::kAny && cluster == 1;
  const int first_peer = group.index * cluster;
  if (kWay == ShrinkWay::kAny && work.cluster == 1) {
    __syncthreads();
  } else {
    device::cluster_arrive_relaxed();
    device::cluster_wait();  // all stages of all members are free
  }
  const int each = small_quotient(kWideTileTokens - 1, cluster) + 1;
  const int own_tokens = min(max(piece.tile.count - member * each, 0), each);
  if (threadIdx.x == 0 && !alone) {
    device::barrier_arrive_expecting(ring.sums(), own_tokens * cluster * kRows * 4);
  }
  if (multiplies) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = first_token + 8 * h;
      if (token < piece.tile.count) {
        const int owner = small_quotient(token, each);
        const int at = (member * each + token - owner * each) * Traits::kSumStride + 4 * q;
        unsigned char* own = ring.shared + 4 * at;
        const uint32_t to = alone ? 0 : device::peer_address(own, first_peer + owner);
        const uint32_t counter = alone ? 0 : device::peer_address(ring.sums(), first_peer + owner);
#pragma unroll
        for (int m = 0; m < kRows / 16; ++m) {
          const float* sum = sums + 8 * m + 2 * h;
          const float4 four = make_float4(sum[0], sum[1], sum[4], sum[5]);
          if (alone) {
            *reinterpret_cast<float4*>(own + 64 * m) = four;
          } else {
            device::store_peer_async(to + 64 * m, four, counter);
          }
        }
      }
    }
  }
  if (alone) {
    __syncthreads();
  } else {
    device::barrier_wait(ring.sums(), sums_turn);
    sums_turn ^= 1;
  }
  constexpr int kQuads = kRows / 4;
  for (int i = threadIdx.x; i < own_tokens * kQuads; i += kWgmmaThreads) {
    const int token = i / kQuads, column = i % kQuads * 4;
    if (column < piece.columns) {
      const float* from =
          reinterpret_cast<const float*>(ring.shared) + token * Traits::kSumStride + column;
      float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
      for (int c = 0; c < cluster; ++c) {
        const float4 next = *reinterpret_cast<const float4*>(from + c * each * Traits::kSumStride);
        sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
      }
      sum.x *= scaling, sum.y *= scaling, sum.z *= scaling, sum.w *= scaling;
      store_sums<T, kWay>(p, piece, member * each + token, first_column + column, sum);
    }
  }
}
#endif

// A cluster serves every so manyth tile, so that a grid of likely size does for any batch; where
// tiles are cut into parts, a CTA serves its part.
template <typename T, int kRows, int kKilobytes, ShrinkWay kWay>
__global__ void __launch_bounds__(WgmmaTraits<kRows, kKilobytes>::kBound,
                                  WgmmaTraits<kRows, kKilobytes>::kBoundBlocks)
    shrink_wgmma_kernel(const __grid_constant__ ShrinkWork work,
                        const __grid_constant__ ShrinkMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Traits = WgmmaTraits<kRows, kKilobytes>;
  device::warm_parameters<kWgmmaThreads>(work);
  const ShrinkParams& p = work.p;
  extern __shared__ unsigned char unaligned[];
  unsigned char* shared =
      unaligned + (-device::shared_address(unaligned) & (Traits::kAlignment - 1));
  StageRing<Traits> ring(shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Traits::kStages; ++i) {
      device::barrier_init(ring.full() + i, 1);
      device::barrier_init(ring.empty() + i, kWarpgroup / 32);
    }
    device::barrier_init(ring.sums(), 1);
    device::barrier_init_fence();
    device::prefetch_map(maps.x);
  }
  if (threadIdx.x < p.num_slices) {
    device::prefetch_map(maps.large_a + threadIdx.x);
  }
  prefetch_tokens<T>(p);
  __syncthreads();
  device::grid_dependency_wait();
  if (p.layout.summed) {
    device::grid_dependency_launch();
  }
  const int all_steps = (static_cast<int>(p.in_features) + kBoxK - 1) / kBoxK;
  uint32_t sums_turn = 0;
  int num_tiles = p.plan.header[kNumWideTiles];
  num_tiles = p.layout.by_tile ? min(num_tiles, p.layout.most_tiles) : num_tiles;
  // Lanes look at the tile of a choice of groups each.
  constexpr bool in_parts = kWay == ShrinkWay::kParts;
  const int cluster = in_parts ? 1 : work.cluster;
  const int cluster_rank = cluster > 1 ? device::cluster_rank() : 0;
  const int lane = threadIdx.x % 32, choice = min(lane, __ffs(cluster) - 1);
  int own_tile = (device::cluster_id() << choice) + small_quotient(cluster_rank, cluster >> choice);
  const auto capacity = static_cast<int>(p.plan.max_tokens / kWideTileTokens + p.plan.num_slots);
  ShrinkPiece piece{};
  // A cluster's tile in the same trip. With parts, which of them a CTA has follows from their
  // number: each lane brings another.
  piece.tile = p.plan.wide_tiles[min(in_parts ? lane : own_tile, capacity - 1)];
  const int halvings =
      in_parts ? 0
               : cluster_halvings(num_tiles * static_cast<int>(gridDim.y), cluster, work.places);
  ShrinkGroup group{cluster >> halvings};
  group.index = small_quotient(cluster_rank, group.size);
  group.member = cluster_rank - group.index * group.size;
  // A group takes every so manyth tile; a part, all steps of the tiles in a row.
  const int part = blockIdx.x;
  int tile = __shfl_sync(0xffffffffu, own_tile, halvings), begin = 0, left = all_steps;
  if (in_parts) {
    const XaLayout::Cut cut = p.layout.cut(num_tiles);
    const int at = cut.begin(part);
    tile = at / all_steps, begin = at - tile * all_steps, left = cut.begin(part + 1) - at;
  }
  const int tile_lane = in_parts ? tile % 32 : halvings;
  piece.tile = {__shfl_sync(0xffffffffu, piece.tile.slot, tile_lane),
                __shfl_sync(0xffffffffu, piece.tile.start, tile_lane),
                __shfl_sync(0xffffffffu, piece.tile.count, tile_lane), 0};
  // One loop for both, whose body is there once: the code, too, comes from memory.
#pragma unroll 1
  for (bool first = true; tile - group.index < num_tiles && left > 0; first = false) {
    const int steps = min(left, all_steps - begin);
    if (!first && !in_parts) {
      device::fence_shared_for_products();
      __syncthreads();  // the sums' room becomes stages again
    }
    if (!first || (in_parts && tile >= 32)) {
      piece.tile = p.plan.wide_tiles[min(tile, num_tiles - 1)];
    }
    if (tile >= num_tiles) {  // only other groups of the cluster have one
      piece.tile = {};
    }
    piece.first_row = int64_t{in_parts ? p.layout.place(part, tile) : tile} * kWideTileTokens;
    // The rank and the tokens come in one trip.
    piece.rank = min(p.ranks[piece.tile.slot], p.max_rank);
    find_tokens(p, piece);
    piece.columns = min(
        XaLayout::padded(piece.rank) * p.num_slices - static_cast<int>(blockIdx.y) * kRows, kRows);
    piece.steps = steps;
    piece.first_k = begin * kBoxK;
    if (group.size > 1) {  // the CTA's share
      const int share = small_quotient(steps * group.member, group.size);
      piece.steps = small_quotient(steps * (group.member + 1), group.size) - share;
      piece.first_k = share * kBoxK;
    }
    if (piece.rank > 0 && piece.columns > 0 && tile < num_tiles) {  // all members of a group alike
      shrink_wgmma_piece<T, Traits, kWay>(work, maps, piece, group, sums_turn, ring);
    } else if (halvings > 0) {
      device::grid_dependency_launch();
      device::cluster_arrive_relaxed();  // other groups push their sums behind a barrier of all
      device::cluster_wait();
    }
    left -= in_parts ? steps : 0;
    tile += in_parts ? 1 : work.num_clusters << halvings;
    begin = 0;
  }
#endif
}

}  // namespace lora_ext::cuda
