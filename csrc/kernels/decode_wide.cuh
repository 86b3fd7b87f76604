// The apply of up to 256 tokens where a slot may have many and its weights are large: tiles of up
// to 64 tokens, so that weights are read once for as many, and not for each 16 as in
// decode_shrink.cuh. Somewhat more tokens of little work take it, too.
//
// Two kernels, chained by programmatic dependent launch. The shrink shares a tile's K among the
// CTAs of a cluster, whose sums meet in distributed shared memory; where tiles are few, K is cut
// into parts for several clusters. The expand has B and y at hand by then, adds the parts
// up, and splits xa into two 16-bit halves as the product wants them. Every sum has a fixed order.
#pragma once

#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "common/wgmma.cuh"
#include "kernels/decode_tile.cuh"
#include "kernels/wide_heuristics.h"

namespace lora_ext::cuda {

// What the kernels share beside the apply's arguments. In a row of xa each slice has room for its
// rank rounded up to 16, and of every 16 columns those that a lane of a product holds are a quad:
// 2 q, 2 q + 1, 2 q + 8, 2 q + 9.
struct WideWork {
  WideSplit split;
  int32_t most_tiles;
  int32_t columns;  // of a row of xa, for the highest rank
  float* parts;     // [tile][part][64][columns]

  __device__ __forceinline__ int num_tiles(const PlanView& plan) const {
    return min(plan.header[kNumWideTiles], most_tiles);
  }
  __device__ __forceinline__ const float* row_of_part(int part, int token) const {
    return parts + (int64_t{part} * kWideTileTokens + token) * columns;
  }
};

LORA_EXT_HOST_DEVICE inline int padded_rank(int rank) { return (rank + 15) / 16 * 16; }

struct WideShrinkTraits {
  static constexpr int kThreads = 256;  // two warpgroups, of half the rows of A each
  static constexpr int kStep = 64;      // values of K, which the swizzle spans
  static constexpr int kStageBytes = (kWideTileTokens + kWideRows) * kStep * 2;
  static constexpr int kStages = 6;                      // two CTAs just fit a multiprocessor
  static constexpr int kAlignment = 1024;                // of a stage, for the swizzle
  static constexpr int kSumsAt = kStages * kStageBytes;  // of the group's CTAs: [CTA][token][64]
  static constexpr int kSumsRow = kWideRows * 4;
  // The last 16 bytes that the alignment leaves are the barrier's.
  static constexpr int kBarrierAt = kSumsAt + kWideTileTokens * kSumsRow;
  static constexpr int kSharedBytes = kBarrierAt + kAlignment;

  // Where four sums of a token lie: neither what a warp writes nor what it reads meets in a bank.
  __device__ static int sums_at(int row, int quad) {
    return kSumsAt + row * kSumsRow + (quad ^ row % 4 * 4) * 16;
  }
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  static constexpr int kBound = kThreads;
#else
  static constexpr int kBound = 32;  // tells the launcher that the kernel is empty here
#endif
};

// The part of a tile's K that a group of CTAs serves, and of its tokens those whose x the thread
// copies: kCopies of them, kCopyRows apart.
template <int kCopies, int kCopyRows>
struct WidePart {
  int num_tiles, index, part, row_group;  // index: of the tile
  WideSplit::Cut cut;
  int group, member;  // of the cluster, and of the group
  int4 tile;          // a Tile
  int rank, ids[kCopies];

  __device__ __forceinline__ bool exists() const { return index < num_tiles; }

  template <bool kFinal>
  __device__ __forceinline__ void find(const ApplyParams& p, const WideWork& work) {
    num_tiles = min(read_plan<kFinal>(p.plan.header + kNumWideTiles), work.most_tiles);
    cut = work.split.cut(num_tiles);
    const int in_cluster = device::cluster_rank();
    group = small_quotient(in_cluster, cut.group), member = in_cluster - group * cut.group;
    const int groups = small_quotient(work.split.cluster, cut.group);
    const int number = device::cluster_id() * groups + group;
    const int cut_number = small_quotient(number, work.split.row_groups);
    row_group = number - cut_number * work.split.row_groups;
    index = small_quotient(cut_number, cut.parts), part = cut_number - index * cut.parts;
    tile = make_int4(-1, 0, 0, 0);
    if (exists()) {
      tile = read_plan<kFinal>(reinterpret_cast<const int4*>(p.plan.wide_tiles + index));
    }
    read_tokens<kFinal>(p);
  }
  // Inside the plan, whatever the tile says.
  __device__ __forceinline__ int index_inside(const ApplyParams& p) const {
    return exists() ? index : 0;
  }
  __device__ __forceinline__ int slot_inside(const ApplyParams& p) const {
    return min(max(tile.x, 0), static_cast<int>(p.plan.num_slots) - 1);
  }
  __device__ __forceinline__ int entry_inside(const ApplyParams& p, int i) const {
    const int entry = tile.y + static_cast<int>(threadIdx.x) / 8 + i * kCopyRows;
    return min(max(entry, 0), static_cast<int>(p.plan.max_tokens) - 1);
  }
  // A plan may be for more tokens than this call has.
  __device__ __forceinline__ int id_of(const ApplyParams& p, int i, int entry) const {
    const int token = static_cast<int>(threadIdx.x) / 8 + i * kCopyRows;
    return token < tile.z && entry < p.num_tokens ? entry : -1;
  }
  template <bool kFinal>
  __device__ __forceinline__ void read_tokens(const ApplyParams& p) {
    rank = min(read_plan<kFinal>(p.ranks + slot_inside(p)), p.max_rank);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      ids[i] = id_of(p, i, read_plan<kFinal>(p.plan.permutation + entry_inside(p, i)));
    }
  }
};

// What the plan says of that now that it is final: all in one trip to memory, used when copies are
// on their way.
template <int kCopies, int kCopyRows>
struct WideCheck {
  int num_tiles, rank, ids[kCopies];
  int4 tile;

  __device__ __forceinline__ WideCheck(const ApplyParams& p,
                                       const WidePart<kCopies, kCopyRows>& at) {
    num_tiles = read_plan<true>(p.plan.header + kNumWideTiles);
    tile = read_plan<true>(reinterpret_cast<const int4*>(p.plan.wide_tiles + at.index_inside(p)));
    rank = read_plan<true>(p.ranks + at.slot_inside(p));
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      ids[i] = read_plan<true>(p.plan.permutation + at.entry_inside(p, i));
    }
  }
  __device__ __forceinline__ bool confirms(const ApplyParams& p, const WideWork& work,
                                           const WidePart<kCopies, kCopyRows>& at) const {
    bool same = min(num_tiles, work.most_tiles) == at.num_tiles;
    if (at.exists()) {
      same &= tile.x == at.tile.x && tile.y == at.tile.y && tile.z == at.tile.z &&
              min(rank, p.max_rank) == at.rank;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        same &= at.id_of(p, i, ids[i]) == at.ids[i];
      }
    }
    return same;
  }
};

// A group of CTAs serves a part of a tile's K and 64 rows of A. Eight threads copy a row's 128
// bytes, of tokens wherever they lie, some steps ahead, and the products take them from shared
// memory. Then each CTA sends the sums of some tokens to the one that adds them up.
// kBeside: nothing is yet to come, but the kernel before may be at work (beside.h).
template <typename T, bool kBeside = false>
__global__ void __launch_bounds__(WideShrinkTraits::kBound, 2)
    decode_wide_shrink_kernel(const __grid_constant__ ApplyParams p,
                              const __grid_constant__ WideWork work) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Traits = WideShrinkTraits;
  constexpr int kStep = Traits::kStep, kStages = Traits::kStages;
  constexpr int kCopyRows = Traits::kThreads / 8, kCopies = 64 / kCopyRows;
  static_assert(kWideRows == 64 && kWideTileTokens == 64);
  extern __shared__ unsigned char unaligned[];
  unsigned char* shared =
      unaligned + (-device::shared_address(unaligned) & (Traits::kAlignment - 1));
  auto* barrier = reinterpret_cast<uint64_t*>(shared + Traits::kBarrierAt);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4,
            q = lane % 4;
  const int chunk = thread % 8, copy_row = thread / 8;
  if (kBeside && device::cluster_id() == work.split.num_clusters) {
    device::grid_dependency_launch();  // one cluster more, which ends when that kernel has
    device::grid_dependency_wait();
    return;
  }
  if (thread == 0) {
    device::barrier_init(barrier, 1);
    device::barrier_init_fence();
  }
  device::cluster_arrive_relaxed();
  // What a CTA does is looked up before the wait, when the plan may be yet to be written, and again
  // behind it, when copies are on their way.
  using Part = WidePart<kCopies, kCopyRows>;
  Part at;
  at.template find<kBeside>(p, work);
  const int all_steps = (static_cast<int>(p.in_features) + kStep - 1) / kStep;
  uint32_t to = device::shared_address(shared) + (copy_row * 8 + (chunk ^ copy_row % 8)) * 16;
  const T *x_from[kCopies], *a_from[kCopies];
  int has_row[kCopies];  // of A
  int steps, left;       // left: of K, from the thread's first values on
  // What has no row becomes zeros, since what lies there may be anything; a row of x without a
  // token reaches sums that nobody reads.
  const auto fetch = [&](int step, int stage_at) {
    const bool inside = step * kStep < left;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (at.ids[i] >= 0) {
        device::copy_async_16_or_zero(to + stage_at + i * kCopyRows * 128, x_from[i] + step * kStep,
                                      inside);
      }
    }
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      device::copy_async_16_or_zero(to + stage_at + (kWideTileTokens + i * kCopyRows) * 128,
                                    a_from[i] + step * kStep, inside & has_row[i]);
    }
  };
  device::cluster_wait();  // all have made their barriers
  bool waited = kBeside, confirmed = kBeside;
#pragma unroll 1
  for (;;) {
    if (!waited && !at.exists()) {  // a look at the number of tiles is all that is left to do
      device::grid_dependency_wait();
      device::grid_dependency_launch();
      waited = true;
      const int now = min(read_plan<true>(p.plan.header + kNumWideTiles), work.most_tiles);
      if (now == at.num_tiles) {
        return;
      }
      at.template find<true>(p, work);
      confirmed = true;
    }
    const int padded = padded_rank(at.rank), first_row = at.row_group * kWideRows;
    const int pieces = at.cut.parts * at.cut.group, piece = at.part * at.cut.group + at.member;
    const int begin = small_quotient(all_steps * piece, pieces);
    steps = at.rank > 0 && at.exists() && first_row < padded * p.slices.count
                ? small_quotient(all_steps * (piece + 1), pieces) - begin
                : -1;
    left = static_cast<int>(p.in_features) - begin * kStep - 8 * chunk;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      x_from[i] =
          static_cast<const T*>(p.x) + max(at.ids[i], 0) * p.x_stride + begin * kStep + 8 * chunk;
      const int row = first_row + copy_row + i * kCopyRows;
      const int slice = padded > 0 ? small_quotient(row, padded) : 0, j = row - slice * padded;
      const bool exists = slice < p.slices.count && j < at.rank;
      has_row[i] = exists;
      a_from[i] = static_cast<const T*>(p.a.base[exists ? slice : 0]) +
                  p.a.row_offset(at.slot_inside(p), exists ? slice : 0, at.rank, exists ? j : 0) +
                  begin * kStep + 8 * chunk;
    }
    if (!waited) {
      if (chunk == 0 && steps > 0) {
        const int bytes = 2 * min(min(steps, kStages) * kStep, left);
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
          if (at.ids[i] >= 0) {
            device::prefetch_l2(x_from[i], bytes);
          }
          if (has_row[i]) {
            device::prefetch_l2(a_from[i], bytes);
          }
        }
      }
      device::grid_dependency_wait();
      device::grid_dependency_launch();
      waited = true;
    }
    // Nothing of the pointers is made again behind the wait.
    asm volatile("" : "+r"(to), "+r"(left), "+r"(steps));
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      asm volatile("" : "+l"(x_from[i]), "+l"(a_from[i]), "+r"(has_row[i]), "+r"(at.ids[i]));
    }
    const WideCheck<kCopies, kCopyRows> check(p, at);
    __syncwarp();  // these loads stay in front of the copies, which would delay them
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      if (s < steps) {
        fetch(s, s * Traits::kStageBytes);
      }
      device::copy_async_commit();
    }
    if (confirmed || !__syncthreads_or(!check.confirms(p, work, at))) {
      break;
    }
    device::copy_async_wait<0>();
    __syncthreads();
    at.template find<true>(p, work);
    confirmed = true;
  }
  if (steps < 0) {
    return;
  }
  const int count = at.tile.z;
  const int own_log = 7 - __ffs(at.cut.group);  // of the tokens that a CTA adds up, 64 / group
  const int own_tokens = min(max(count - (at.member << own_log), 0), 1 << own_log);
  if (thread == 0) {
    device::barrier_arrive_expecting(barrier, own_tokens * at.cut.group * Traits::kSumsRow);
  }
  // sums[4 n + 2 h + e] is token 16 (warp % 4) + 8 h + g, row 8 n + 2 q + e of the warpgroup's.
  float sums[16] = {};
  const int half = warp / 4;
  const float scaling = p.scalings[at.tile.x];
  // Few steps are on their way all at once, and are multiplied all at once; many two at a time,
  // since a barrier for each takes as long as the products do. An odd one is the first.
  int together = steps <= kStages ? steps : 2 - steps % 2;
  int stage = 0;
#pragma unroll 1
  for (int step = 0; step < steps;) {
    if (steps <= kStages) {
      device::copy_async_wait<0>();
    } else if (step == 0) {
      device::copy_async_wait<kStages - 2>();
    } else {
      device::copy_async_wait<kStages - 4>();
    }
    device::fence_shared_for_products();
    device::wgmma_wait<0>();
    __syncthreads();  // the steps' data are there, and the products of those before are done
    if (step > 0) {   // whose stages are filled again
#pragma unroll 1
      for (; together > 0; --together) {
        const int to_stage = stage - together * Traits::kStageBytes;
        if (step - together + kStages < steps) {
          fetch(step - together + kStages,
                to_stage < 0 ? to_stage + kStages * Traits::kStageBytes : to_stage);
        }
        device::copy_async_commit();
      }
      together = 2;
    }
#pragma unroll 1
    for (const int end = step + together; step < end; ++step) {
      device::wgmma_fence();
      const uint64_t tokens = device::swizzled_tile(shared + stage);
      const uint64_t weights =
          device::swizzled_tile(shared + stage + (kWideTileTokens + half * 32) * 128);
#pragma unroll
      for (int kk = 0; kk < kStep / 16; ++kk) {
        device::wgmma<T, 32>(sums, tokens + 2 * kk, weights + 2 * kk);
      }
      device::wgmma_commit();
      stage += Traits::kStageBytes;
      stage = stage < kStages * Traits::kStageBytes ? stage : 0;
    }
  }
  device::wgmma_wait<0>();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int token = 16 * (warp % 4) + 8 * h + g, owner = token >> own_log;
    const int row = (at.member << own_log) + token - (owner << own_log);
    const uint32_t peer = device::peer_address(shared, at.group * at.cut.group + owner);
    if (token < count) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const float* sum = sums + 8 * m + 2 * h;
        device::store_peer_async(peer + Traits::sums_at(row, 4 * (2 * half + m) + q),
                                 make_float4(sum[0], sum[1], sum[4], sum[5]),
                                 peer + Traits::kBarrierAt);
      }
    }
  }
  const int quad = thread % 16, row = at.row_group * kWideRows + 4 * quad;
  float* const out = const_cast<float*>(work.row_of_part(at.index * at.cut.parts + at.part,
                                                         at.member << own_log)) +
                     row;
  device::barrier_wait(barrier, 0);
  if (row < padded_rank(at.rank) * p.slices.count) {
#pragma unroll 1
    for (int token = thread / 16; token < own_tokens; token += Traits::kThreads / 16) {
      const unsigned char* from = shared + Traits::sums_at(token, quad);
      float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 1
      for (int first = 0; first < at.cut.group; first += 8) {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const int there = min(first + c, at.cut.group - 1);
          device::add_masked(
              sum, *reinterpret_cast<const float4*>(from + (there << own_log) * Traits::kSumsRow),
              (first + c - at.cut.group) >> 31);
        }
      }
      sum.x *= scaling, sum.y *= scaling, sum.z *= scaling, sum.w *= scaling;
      *reinterpret_cast<float4*>(out + token * work.columns) = sum;
    }
  }
#endif
}

}  // namespace lora_ext::cuda
