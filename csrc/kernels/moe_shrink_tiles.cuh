// What both ways have in common in which a CTA of moe_shrink computes its rows of a tile, and the
// one for few pairs: see moe_shrink.cu.
#pragma once

#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "kernels/moe_apply.h"

namespace lora_ext::cuda {

// Up to so many the sums of all pairs fit a warp's registers, so that the warps can divide K.
constexpr int kFewPairs = 16;
constexpr int kCachedSlots = kMoeThreads;  // ranks that are fetched before the tile is known

struct MoeShrinkMatrix {
  const void* a;
  int64_t slot_stride, expert_stride, row_stride;
};
// Only what the kernel reads, the parameter bank being cold at every launch.
struct alignas(64) MoeShrinkParams {
  MoeRouting routing;
  const int32_t* ranks;
  const float* scalings;
  const void *x, *topk_weights;
  float* xa;
  int64_t x_stride, xa_row_stride, xa_plane;
  MoePairDivisor x_divisor;
  int32_t num_slots, num_experts, num_pairs, in_features, max_rank;
  int32_t xa_rank_stride, num_slices, splits, split_features, blocks_per_matrix, prefetch_features;
  bool packed, float_weights;
  bool expand_later;  // it may start when the first copies are on their way, not at once
  MoeShrinkMatrix matrices[kMaxSlices];         // one where A is packed
  int32_t members, member_features, few_tiles;  // see MoeShrinkConfig; read where CTAs share
};

struct MoeShrinkShared {
  int ranks[kCachedSlots];
  int pairs[kMoeTilePairs];  // -1: none
  float scales[kMoeTilePairs];
};

// kRowBlocks: blocks of 16 rows that a CTA computes; kManyBlocks: where pairs are many. kDeep: more
// steps on their way, of which fewer CTAs have room on an SM.
template <int kRowBlocks, bool kWide, bool kDeep = false>
struct MoeShrinkTraits {
  static constexpr int kRows = 16 * kRowBlocks;
  static constexpr int kStride = kRows + 4;  // no two lanes of a store or load share a bank
  using Sums = float[16][kStride];           // of a warp
  static constexpr int kManyBlocks = kWide ? 2 * kRowBlocks : kRowBlocks;
  // Steps of many pairs. Three where rows are many: four would keep a third CTA out.
  static constexpr int kSteps = kWide ? (kDeep ? 4 : 3) : kDeep ? 8 : 4;
  static constexpr int kSharedBytes = kSteps * (16 * kManyBlocks + kMoeTilePairs) * 128;
  static_assert(kMoeWarps * static_cast<int>(sizeof(Sums)) <= kSharedBytes);
};

// A thread's pair of the tile, and what its sums are scaled by, all of which may be on their way:
// nothing waits for what it is not about to use.
template <typename T>
struct MoeShrinkPair {
  int pair;  // as in the permutation
  float scaling;
  uint32_t weight;  // its bits

  // The pair goes to shared memory, and the scales are asked for.
  __device__ __forceinline__ void publish(const MoeShrinkParams& p, int slot,
                                          MoeShrinkShared& shared) {
    const int thread = threadIdx.x;
    scaling = 0.0f;
    weight = 0;
    if (thread >= kMoeTilePairs) {
      return;
    }
    pair = pair < p.num_pairs ? pair : -1;
    shared.pairs[thread] = pair;
    if (pair >= 0) {
      scaling = p.scalings[slot];
      if (p.topk_weights != nullptr) {
        weight = p.float_weights ? static_cast<const uint32_t*>(p.topk_weights)[pair]
                                 : static_cast<const uint16_t*>(p.topk_weights)[pair];
      }
    }
  }
  __device__ __forceinline__ void publish_scale(const MoeShrinkParams& p,
                                                MoeShrinkShared& shared) const {
    if (threadIdx.x < kMoeTilePairs) {
      shared.scales[threadIdx.x] = p.topk_weights == nullptr ? scaling
                                   : p.float_weights         ? scaling * __uint_as_float(weight)
                                                     : scaling * device::unpack<T>(weight, 0);
    }
  }
};

struct MoeShrinkWork {
  int count, rank;
  int matrix, row0, rows;  // rows of the whole matrix
  int k_begin, k_end, split;
};

// How the CTAs of a cluster share a part of K: they send each other their sums.
struct MoeShrinkShare {
  bool on;
  uint64_t* arrived;  // turns over when all sums that are for this CTA have come
  uint32_t parity;

  // Before the first ring_is_free(), behind which the others send.
  __device__ __forceinline__ void begin() const {
    if (threadIdx.x == 0) {
      device::barrier_init(arrived, 1);
#if __CUDA_ARCH__ >= 900
      device::barrier_init_fence();
#endif
    }
  }
  // Of all threads, where the CTA has no more use for its ring, since sums go to where it was.
  template <bool kTwoWays>
  __device__ __forceinline__ void ring_is_free() const {
#if __CUDA_ARCH__ >= 900
    if (kTwoWays && on) {
      device::cluster_arrive_relaxed();
    }
#endif
  }
};

// Scales and stores the sums of a pair for four rows.
__device__ __forceinline__ void store_rows(const MoeShrinkParams& p, const MoeShrinkWork& work,
                                           int pair, int row, float scale, float4 sum) {
  sum = make_float4(sum.x * scale, sum.y * scale, sum.z * scale, sum.w * scale);
  float* to = p.xa + work.split * p.xa_plane + pair * p.xa_row_stride;
  if (!p.packed) {  // what lies behind the rank is never used
    *reinterpret_cast<float4*>(to + work.matrix * p.xa_rank_stride + row) = sum;
  } else if (work.rank % 4 == 0) {
    const int slice = small_quotient(row, work.rank);
    *reinterpret_cast<float4*>(to + slice * p.xa_rank_stride + row - slice * work.rank) = sum;
  } else {
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int slice = small_quotient(row + e, work.rank);
      if (row + e < work.rows) {
        to[slice * p.xa_rank_stride + row + e - slice * work.rank] = values[e];
      }
    }
  }
}

// Adds up what kWarps warps have at `sums` in shared memory, [warp][pair][row], and the other CTAs
// that share the part of K, scales it, and stores it. Four rows of a pair are an item; of those
// each CTA finishes kMoeThreads at a time in turn.
template <int kWarps, int kPairs, int kRows, bool kTwoWays>
__device__ __forceinline__ void finish_sums(const MoeShrinkParams& p, const MoeShrinkWork& work,
                                            const MoeShrinkShared& shared, float* sums,
                                            MoeShrinkShare& share) {
  constexpr int kStride = kRows + 4, kWarpSums = (kWarps == 1 ? kPairs : 16) * kStride;
  constexpr int kQuads = kRows / 4;
  const int thread = threadIdx.x;
  const auto add = [](float4& sum, const float* from) {
    const float4 part = *reinterpret_cast<const float4*>(from);
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  };
  const auto sum_of = [&](int item) {
    const float* from = sums + item / kQuads * kStride + item % kQuads * 4;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      add(sum, from + w * kWarpSums);
    }
    return sum;
  };
#if __CUDA_ARCH__ >= 900
  if (kTwoWays && share.on) {
    const int items = work.count * kQuads, turn = kMoeThreads * p.members;
    const int room = (kPairs * kQuads + turn - 1) / turn * kMoeThreads;  // for a CTA's sums
    const int rank = device::cluster_rank();
    float* const incoming = sums + kWarps * kWarpSums + thread * 4;  // [CTA][item]
    if (thread == 0) {
      const int rest = min(max(items % turn - rank * kMoeThreads, 0), kMoeThreads);
      device::barrier_arrive_expecting(share.arrived,
                                       (items / turn * kMoeThreads + rest) * p.members * 16);
    }
    device::cluster_wait();  // no CTA needs its ring
    float* to = incoming + rank * room * 4;
    for (int item = thread, owner = 0; item < items; item += kMoeThreads) {
      device::store_peer_async(device::peer_address(to, owner), sum_of(item),
                               device::peer_address(share.arrived, owner));
      if (++owner == p.members) {
        owner = 0, to += 4 * kMoeThreads;
      }
    }
    device::barrier_wait(share.arrived, share.parity);
    share.parity ^= 1;
    const float* from = incoming;
    for (int item = rank * kMoeThreads + thread; item < items; item += turn) {
      const int pair = shared.pairs[item / kQuads], row = work.row0 + item % kQuads * 4;
      if (pair >= 0 && row < work.rows) {
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 2
        for (int member = 0; member < p.members; ++member) {
          add(sum, from + member * room * 4);
        }
        store_rows(p, work, pair, row, shared.scales[item / kQuads], sum);
      }
      from += 4 * kMoeThreads;
    }
    return;
  }
#endif
  for (int item = thread; item < kPairs * kQuads; item += kMoeThreads) {
    const int pair = shared.pairs[item / kQuads], row = work.row0 + item % kQuads * 4;
    if (pair >= 0 && row < work.rows) {
      store_rows(p, work, pair, row, shared.scales[item / kQuads], sum_of(item));
    }
  }
}

// Few pairs: kBlocks blocks of 8. Neighbouring warps take neighbouring 64-byte pieces of the same
// rows, so that DRAM sees runs, and copy them, some steps ahead, to where the same lane reads them:
// no barrier stands between a copy and its use, and loads in flight take no registers.
template <typename T, int kRowBlocks, int kBlocks, int kBufferBytes, bool kVector, bool kTwoWays>
__device__ __forceinline__ void shrink_few(const MoeShrinkParams& p, const MoeShrinkWork& work,
                                           const T* a, int64_t a_stride, int slot,
                                           MoeShrinkPair<T> pair, MoeShrinkShare& share,
                                           MoeShrinkShared& shared, unsigned char* buffer) {
  using Traits = MoeShrinkTraits<kRowBlocks, false>;
  constexpr int kWeights = 2 * kRowBlocks, kChunks = kWeights + kBlocks;  // of a lane in a step
  constexpr int kSlotBytes = kMoeThreads * 16, kStageBytes = kChunks * kSlotBytes;
  constexpr int kStages = kBufferBytes / kStageBytes, kStepFeatures = 32 * kMoeWarps;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4,
            q = lane % 4;
  unsigned char* const own = buffer + thread * 16;
  const auto copy = [&](unsigned char* to, const T* row, int k, bool exists) {
    if constexpr (kVector) {
      device::copy_async_16<true>(to, row + k, exists && k < work.k_end ? 16 : 0);
    } else {
      device::Chunk<T, 8> values;
      device::load_scalars(values, row + k, exists ? work.k_end - k : 0);
      *reinterpret_cast<uint4*>(to) =
          make_uint4(values.words[0], values.words[1], values.words[2], values.words[3]);
    }
  };
  const int first_row = work.row0 + g, k_lane = work.k_begin + 32 * warp + 8 * q;
  const int steps = (work.k_end - work.k_begin + kStepFeatures - 1) / kStepFeatures;
  const auto copy_weights = [&](int step, unsigned char* to) {
    const T* row = a + first_row * a_stride;
#pragma unroll
    for (int i = 0; i < kWeights; ++i) {
      copy(to + i * kSlotBytes, row, k_lane + kStepFeatures * step, first_row + 8 * i < work.rows);
      row += 8 * a_stride;
    }
  };
  const T* tokens[kBlocks];
  const auto copy_tokens = [&](int step, unsigned char* to) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      copy(to + (kWeights + n) * kSlotBytes, tokens[n], k_lane + kStepFeatures * step,
           tokens[n] != nullptr);
    }
  };
  const int ahead = min(kStages - 1, steps);
  // The weights of a step are asked for before anything waits for the pairs; behind more of them x
  // would queue.
  if (ahead > 0) {
    copy_weights(0, own);
  }
  pair.publish(p, slot, shared);
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
    const int of = shared.pairs[8 * n + g];
    tokens[n] =
        of >= 0 ? static_cast<const T*>(p.x) + p.x_divisor.token_of(of) * p.x_stride : nullptr;
  }
#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < ahead) {
      copy_tokens(step, own + step * kStageBytes);
      if (step > 0) {
        copy_weights(step, own + step * kStageBytes);
      }
    }
    device::copy_async_commit();
  }
  pair.publish_scale(p, shared);
  if (p.expand_later) {
    device::grid_dependency_launch();
  }
  float acc[kRowBlocks][kBlocks][4] = {};
  int fill_at = (kStages - 1) * kStageBytes, use_at = 0;
  const auto read = [&](uint32_t(&words)[4], int slot) {
    const uint4 raw = *reinterpret_cast<const uint4*>(own + use_at + slot * kSlotBytes);
    words[0] = raw.x, words[1] = raw.y, words[2] = raw.z, words[3] = raw.w;
  };
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    if (step + kStages - 1 < steps) {
      copy_weights(step + kStages - 1, own + fill_at);
      copy_tokens(step + kStages - 1, own + fill_at);
    }
    device::copy_async_commit();
    device::copy_async_wait<kStages - 1>();
    uint32_t x[kBlocks][4];
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      read(x[n], kWeights + n);
    }
#pragma unroll
    for (int block = 0; block < kRowBlocks; ++block) {
      uint32_t upper[4], lower[4];
      read(upper, 2 * block);
      read(lower, 2 * block + 1);
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int w = 0; w < 4; w += 2) {
          device::mma<T>(acc[block][n], upper[w], lower[w], upper[w + 1], lower[w + 1], x[n][w],
                         x[n][w + 1]);
        }
      }
    }
    fill_at = use_at;
    use_at += kStageBytes;
    use_at = use_at < kStages * kStageBytes ? use_at : 0;
  }
  share.ring_is_free<kTwoWays>();
  __syncthreads();  // the buffer is for the sums now
  auto* partial = reinterpret_cast<typename Traits::Sums*>(buffer);

#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        partial[warp][8 * n + 2 * q + e % 2][16 * block + 8 * (e / 2) + g] = acc[block][n][e];
      }
    }
  }
  __syncthreads();
  finish_sums<kMoeWarps, 8 * kBlocks, Traits::kRows, kTwoWays>(p, work, shared, &partial[0][0][0],
                                                               share);
  __syncthreads();
}

}  // namespace lora_ext::cuda
