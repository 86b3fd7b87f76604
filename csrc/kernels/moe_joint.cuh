// Both products of a tile of pairs in one kernel, for the smallest batches and up to 16 ranks: what
// lies between the products is a sum over warps in shared memory instead of the end of a kernel,
// the start of another one and a trip to L2.
//
// A CTA takes a tile and 256 columns of one slice. A, x, B and y are on their way at once. For the
// first product the CTAs of a cluster, up to eight that share a tile and a slice, and in each the
// warps divide K, and send each other their sums; without clusters each CTA reads all of the
// slice's A. For the second the warps divide the columns; the copies go to where the same lane
// reads them, so that there is one barrier for eight pairs.
#pragma once

#include "kernels/moe_expand_tiles.cuh"

namespace lora_ext::cuda {

constexpr int kJointRows = 16, kJointPairs = 8;

struct MoeJointSlice {
  const void *a, *b;
  int64_t a_slot_stride, a_expert_stride, a_row_stride;
  int64_t b_slot_stride, b_expert_stride, b_row_stride;
  int64_t b_first_row, column_start;
  int32_t width, blocks;
};
struct alignas(64) MoeJointParams {
  MoeRouting routing;
  const int32_t* ranks;
  const float* scalings;
  const void *x, *topk_weights;
  void* y;
  int64_t x_stride, y_stride, column_stride;
  int32_t x_divisor, num_slots, num_experts, num_pairs, in_features, max_rank, num_slices;
  int32_t cluster, part_steps;  // CTAs of a cluster, and steps of K of each
  bool packed, float_weights;
  MoeJointSlice slices[kMaxSlices];
};

// A CTA's shared memory: A as [step][upper or lower rows][thread], x as [step][thread], B as
// [column][thread], and twice the sums: of the warps, and of the cluster's CTAs.
struct MoeJointTraits {
  static constexpr int kStepFeatures = 32 * kMoeWarps, kColumns = kMoeWarps * kUnitColumns;
  static constexpr int kSlotBytes = kMoeThreads * 16, kRankSlotBytes = kMoeThreads * 8;
  static constexpr int kRowStride = kJointRows + 4;  // no two lanes meet in a bank
  static constexpr int kSumBytes = kMoeWarps * kJointPairs * kRowStride * 4;
  static constexpr int kWeightBytes = 8 * kRankSlotBytes;
  static constexpr int kPeerSums = kJointPairs * kJointRows;  // of a CTA
  static_assert(kColumns == kMoeJointColumns);

  __host__ __device__ static constexpr int steps(int in_features) {
    return (in_features + kStepFeatures - 1) / kStepFeatures;
  }
  static constexpr int shared_bytes(int part_steps, int cluster) {
    return part_steps * 3 * kSlotBytes + kWeightBytes + 2 * kSumBytes + 2 * cluster * kPeerSums * 4;
  }
};

// What will likely be read, to L2, before it may be: see prefetch_part in moe_shrink.cu. Of A a CTA
// takes its part of K, or, where all CTAs of the slice read all of K, some rows.
template <typename T>
__device__ __forceinline__ void prefetch_joint(const MoeJointParams& p, const MoeJointSlice& s,
                                               int slice, int block, int warp_column, int k_begin,
                                               int k_end) {
  const int index = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (index >= p.routing.tile_limit) {
    return;
  }
  const int4 raw = __ldcg(reinterpret_cast<const int4*>(moe_tiles(p.routing.routing) + index));
  const int offset = __ldcg(p.routing.routing + kPermutationOffset);
  const MoeTile tile{raw.x, raw.y, raw.z, raw.w};
  if (!is_valid(tile, p.num_slots, p.num_experts)) {
    return;
  }
  const int rank = min(__ldcg(p.ranks + tile.slot), p.max_rank);
  if (warp == 0) {
    const int row = p.cluster > 1 ? lane : lane * s.blocks + block;
    if (row < rank && k_begin < k_end) {
      device::prefetch_l2(static_cast<const T*>(s.a) + tile.slot * s.a_slot_stride +
                              tile.expert * s.a_expert_stride +
                              ((p.packed ? slice * rank : 0) + row) * s.a_row_stride + k_begin,
                          2 * (k_end - k_begin));
    }
  }
  if (lane == 0 && rank > 0 && s.b_row_stride == p.max_rank && warp_column < s.width) {
    const int columns = min(kUnitColumns, s.width - warp_column);
    device::prefetch_l2(static_cast<const T*>(s.b) + tile.slot * s.b_slot_stride +
                            tile.expert * s.b_expert_stride +
                            (s.b_first_row + warp_column) * s.b_row_stride,
                        columns * p.max_rank * 2);
  }
  const int64_t at = int64_t{offset} + tile.start + lane;
  if (warp == 1 && k_begin < k_end && lane < min(tile.count, kJointPairs) && at >= 0 &&
      at < p.routing.size()) {
    const int pair = __ldcg(p.routing.routing + at);
    if (pair >= 0 && pair < p.num_pairs) {
      device::prefetch_l2(
          static_cast<const T*>(p.x) +
              static_cast<int>(static_cast<unsigned>(pair) / p.x_divisor) * p.x_stride + k_begin,
          2 * (k_end - k_begin));
    }
  }
}

template <typename T, typename Y, bool kVector, bool kClusters>
__global__ void __launch_bounds__(kMoeThreads)
    moe_joint_kernel(const __grid_constant__ MoeJointParams p) {
  using Traits = MoeJointTraits;
  constexpr int kChunk = 4, kSlotBytes = Traits::kSlotBytes, kRow = Traits::kRowStride;
  extern __shared__ __align__(128) unsigned char shared[];
  [[maybe_unused]] __shared__ uint64_t arrived[2];  // the sums of all CTAs of the cluster
  const int thread = threadIdx.x, lane = thread % 32, g = lane / 4, q = lane % 4;
  const int warp = __shfl_sync(kAllLanes, thread / 32, 0);
  unsigned char* const own_a = shared + thread * 16;
  unsigned char* const own_x = own_a + p.part_steps * 2 * kSlotBytes;
  unsigned char* const own_b = shared + p.part_steps * 3 * kSlotBytes + thread * 8;
  float* const sums =
      reinterpret_cast<float*>(shared + p.part_steps * 3 * kSlotBytes + Traits::kWeightBytes);
  int part = 0;
#if __CUDA_ARCH__ >= 900
  if constexpr (kClusters) {
    part = device::cluster_rank();
    if (thread == 0) {
      device::barrier_init(&arrived[0], 1);
      device::barrier_init(&arrived[1], 1);
      device::barrier_init_fence();
    }
    device::cluster_arrive_relaxed();
  }
#endif
  const int k_begin = part * p.part_steps * Traits::kStepFeatures;
  const int k_end = min(k_begin + p.part_steps * Traits::kStepFeatures, p.in_features);
  const int steps = Traits::steps(max(k_end - k_begin, 0));
  int block = blockIdx.x, slice = 0;
  while (block >= p.slices[slice].blocks) {
    block -= p.slices[slice++].blocks;
  }
  const MoeJointSlice& s = p.slices[slice];
  const int first_column = block * Traits::kColumns + warp * kUnitColumns;
  const int column = first_column + 8 * g;
  prefetch_joint<T>(p, s, slice, block, first_column, k_begin, k_end);
#if __CUDA_ARCH__ >= 900
  if constexpr (kClusters) {
    device::cluster_wait();  // the barriers of all are there
  }
#endif
  device::grid_dependency_wait();
  device::grid_dependency_launch();
  const int num_tiles = p.routing.num_tiles();
  const int32_t* permutation = p.routing.permutation();
  MoeTile tile = p.routing.tile(blockIdx.y);
  const bool few_slots = p.num_slots <= 32;  // their ranks are read beside the tile
  const int lane_rank = few_slots && lane < p.num_slots ? p.ranks[lane] : 0;
  const float lane_scaling = few_slots && lane < p.num_slots ? p.scalings[lane] : 0.0f;
  int turn = 0;
  [[maybe_unused]] int parity = 0;  // of the barriers, a bit each
#pragma unroll 1
  for (int index = blockIdx.y; index < num_tiles; index += gridDim.y) {
    if (index != blockIdx.y) {
      tile = p.routing.tile(index);
    }
    if (!is_valid(tile, p.num_slots, p.num_experts)) {
      continue;
    }
    const int slot_rank =
        few_slots ? __shfl_sync(kAllLanes, lane_rank, tile.slot) : p.ranks[tile.slot];
    const int rank = min(slot_rank, p.max_rank);
    if (rank <= 0) {
      continue;
    }
    const float scaling =
        few_slots ? __shfl_sync(kAllLanes, lane_scaling, tile.slot) : p.scalings[tile.slot];
    // The tile's pairs, two to a lane; -1: none.
    int pairs[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = 32 * i + lane;
      pairs[i] = at < tile.count ? permutation[tile.start + at] : -1;
    }
    const int k_lane = k_begin + 32 * warp + 8 * q;
    const auto copy = [&](unsigned char* to, const T* row, int k, bool exists) {
      if constexpr (kVector) {
        device::copy_async_16<true>(to, row + k, exists && k < k_end ? 16 : 0);
      } else {
        device::Chunk<T, 8> values;
        device::load_scalars(values, row + k, exists ? k_end - k : 0);
        write_chunk(to, values);
      }
    };
    {
      const T* a = static_cast<const T*>(s.a) + tile.slot * s.a_slot_stride +
                   tile.expert * s.a_expert_stride +
                   ((p.packed ? slice * rank : 0) + g) * s.a_row_stride;
#pragma unroll 4
      for (int step = 0; step < steps; ++step) {
        const int k = k_lane + step * Traits::kStepFeatures;
        copy(own_a + 2 * step * kSlotBytes, a, k, g < rank);
        if (rank > 8) {
          copy(own_a + (2 * step + 1) * kSlotBytes, a + 8 * s.a_row_stride, k, g + 8 < rank);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      pairs[i] = pairs[i] < p.num_pairs ? pairs[i] : -1;
    }
    const auto pair_of = [&](int round, int i) {
      return __shfl_sync(kAllLanes, round < 4 ? pairs[0] : pairs[1],
                         (kJointPairs * round + i) % 32);
    };
    const bool weighted = p.topk_weights != nullptr;
    uint32_t next_weight = 0;  // of pair g: its bits, which nothing waits for before the sums
    const auto load_tokens = [&](int round) {
      const int pair = pair_of(round, g);
      const T* x =
          static_cast<const T*>(p.x) + small_quotient(max(pair, 0), p.x_divisor) * p.x_stride;
#pragma unroll 4
      for (int step = 0; step < steps; ++step) {
        copy(own_x + step * kSlotBytes, x, k_lane + step * Traits::kStepFeatures, pair >= 0);
      }
      device::copy_async_commit();
      if (weighted && pair >= 0) {
        next_weight = p.float_weights ? static_cast<const uint32_t*>(p.topk_weights)[pair]
                                      : static_cast<const uint16_t*>(p.topk_weights)[pair];
      }
    };
    // Output o of a lane: pair 2 q + o of the round, eight columns.
    Y* const y = static_cast<Y*>(p.y) + s.column_start + column * (kVector ? 1 : p.column_stride);
    device::Outputs<Y> outputs[2];
    const auto load_y = [&](int round) {
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        const int pair = pair_of(round, 2 * q + o);
        if (kVector && pair >= 0 && column < s.width) {
          outputs[o].load(y + pair * p.y_stride);
        }
      }
    };
    load_tokens(0);
    {
      const T* b = static_cast<const T*>(s.b) + tile.slot * s.b_slot_stride +
                   tile.expert * s.b_expert_stride + (s.b_first_row + column) * s.b_row_stride;
      const int valid = min(max(rank - q * kChunk, 0), kChunk);
#pragma unroll
      for (int part = 0; part < 8; ++part) {
        unsigned char* to = own_b + part * Traits::kRankSlotBytes;
        if constexpr (kVector) {
          device::copy_async_8<true>(to, b + part * s.b_row_stride + q * kChunk,
                                     column + part < s.width ? 2 * valid : 0);
        } else {
          device::Chunk<T, kChunk> weights;
          load_ranks<T, kChunk, false>(weights, b + part * s.b_row_stride, q * kChunk, rank,
                                       column + part < s.width);
          write_chunk(to, weights);
        }
      }
    }
    device::copy_async_commit();
    const int rounds = (tile.count + kJointPairs - 1) / kJointPairs;
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
      load_y(round);
      const uint32_t weight = next_weight;
      device::copy_async_wait<1>();  // not for B
      float acc[2][4] = {};
#pragma unroll 2
      for (int step = 0; step < steps; ++step) {
        device::Chunk<T, 8> upper, lower{}, x;
        read_chunk(upper, own_a + 2 * step * kSlotBytes);
        if (rank > 8) {
          read_chunk(lower, own_a + (2 * step + 1) * kSlotBytes);
        }
        read_chunk(x, own_x + step * kSlotBytes);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int w = 2 * half;
          device::mma<T>(acc[half], upper.words[w], lower.words[w], upper.words[w + 1],
                         lower.words[w + 1], x.words[w], x.words[w + 1]);
        }
      }
      float* const own_sums = sums + turn * (Traits::kSumBytes / 4);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        own_sums[(warp * kJointPairs + 2 * q + e % 2) * kRow + 8 * (e / 2) + g] =
            acc[0][e] + acc[1][e];
      }
      if (round + 1 < rounds) {
        load_tokens(round + 1);
      } else {
        device::copy_async_commit();
      }
      device::copy_async_commit();  // in the place of B, which the first round has here
      __syncthreads();
      float4 total = make_float4(0, 0, 0, 0);
      const auto add = [&](const float* from) {
        const float4 more = *reinterpret_cast<const float4*>(from);
        total.x += more.x, total.y += more.y, total.z += more.z, total.w += more.w;
      };
#pragma unroll
      for (int w = 0; w < kMoeWarps; ++w) {
        add(own_sums + (w * kJointPairs + g) * kRow + q * kChunk);
      }
#if __CUDA_ARCH__ >= 900
      if constexpr (kClusters) {
        // Each warp sends them to some of the CTAs. None fills the same place again before all have
        // read what is there: for that it needs their next sums.
        float* const parts = sums + 2 * (Traits::kSumBytes / 4) +
                             turn * p.cluster * Traits::kPeerSums + g * kJointRows + q * kChunk;
        if (thread == 0) {
          device::barrier_arrive_expecting(&arrived[turn], p.cluster * Traits::kPeerSums * 4);
        }
        for (int peer = warp; peer < p.cluster; peer += kMoeWarps) {
          device::store_peer_async(device::peer_address(parts + part * Traits::kPeerSums, peer),
                                   total, device::peer_address(&arrived[turn], peer));
        }
        device::barrier_wait(&arrived[turn], parity >> turn & 1);
        parity ^= 1 << turn;
        total = make_float4(0, 0, 0, 0);
#pragma unroll 4
        for (int n = 0; n < p.cluster; ++n) {
          add(parts + n * Traits::kPeerSums);
        }
      }
#endif
      turn ^= 1;
      const float pair_scale = !weighted         ? scaling
                               : p.float_weights ? scaling * __uint_as_float(weight)
                                                 : scaling * device::unpack<T>(weight, 0);
      const float xa[kChunk] = {total.x * pair_scale, total.y * pair_scale, total.z * pair_scale,
                                total.w * pair_scale};
      int max_bits = 0;
      if constexpr (device::kNeedsScale<T>) {
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
          max_bits = max(max_bits, __float_as_int(fabsf(xa[e])));
        }
        max_bits = max(max_bits, __shfl_xor_sync(kAllLanes, max_bits, 1));
        max_bits = max(max_bits, __shfl_xor_sync(kAllLanes, max_bits, 2));
      }
      device::copy_async_wait<2>();  // B
      SplitChunk<T, kChunk> split;
      split.set(xa, device::kNeedsScale<T> ? device::scale_down(max_bits) : 1.0f);
      device::Chunk<T, kChunk> weights[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        read_chunk(weights[i], own_b + i * Traits::kRankSlotBytes);
      }
      float delta_of[4][4] = {};
      multiply<T, kChunk, 4>(delta_of, weights, split);
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        const int pair = pair_of(round, 2 * q + o);
        const float scale_up =
            device::kNeedsScale<T>
                ? device::scale_up(__shfl_sync(kAllLanes, max_bits, 4 * (2 * q + o)))
                : 1.0f;
        if (pair < 0 || column >= s.width) {
          continue;
        }
        float delta[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          delta[i] = delta_of[i / 2][i % 2 * 2 + o] * scale_up;
        }
        Y* to = y + pair * p.y_stride;
        if constexpr (kVector) {
          outputs[o].add(delta);
          outputs[o].store(to);
        } else {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            if (column + i < s.width) {
              Y* at = to + i * p.column_stride;
              *at = device::from_float<Y>(device::to_float(*at) + delta[i]);
            }
          }
        }
      }
    }
  }
}

}  // namespace lora_ext::cuda
