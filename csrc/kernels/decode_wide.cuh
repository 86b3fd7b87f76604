// The apply of up to 256 tokens where a slot may have many and its weights are large: tiles of up
// to 64 tokens, so that weights are read once for as many, and not for each 16 as in
// decode_shrink.cuh.
//
// Three kernels, chained by programmatic dependent launch. The shrink shares a tile's K among as
// many CTAs as have room, each of which leaves a part of xa. The second adds the parts up, on all
// multiprocessors, and splits xa into two 16-bit halves as the product wants them: CTAs of the
// expand would each read all parts again, and that is more than all weights. The expand has B and y
// in shared memory by then. Every sum has a fixed order.
#pragma once

#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "common/wgmma.cuh"
#include "kernels/decode_tile.cuh"
#include "kernels/heuristics.h"

namespace lora_ext::cuda {

// What the kernels share beside the apply's arguments. In a row of xa each slice has room for its
// rank rounded up to 16, and of every 16 columns those that a lane of a product holds are a quad:
// 2 q, 2 q + 1, 2 q + 8, 2 q + 9.
struct WideWork {
  WideSplit split;
  int32_t most_tiles;
  int32_t columns;  // of a row of xa, for the highest rank
  float* parts;     // [tile][part][64][columns]
  uint4* halves;    // [tile][64][slice][quads]: the upper halves of a quad's ranks, and the lower
  float* scales;    // [tile][64][slice], fp16: what to multiply with

  __device__ __forceinline__ int num_tiles(const PlanView& plan) const {
    return min(plan.header[kNumWideTiles], most_tiles);
  }
  __device__ __forceinline__ const float* row_of_part(int part, int token) const {
    return parts + (int64_t{part} * kWideTileTokens + token) * columns;
  }
};

LORA_EXT_HOST_DEVICE inline int padded_rank(int rank) { return (rank + 15) / 16 * 16; }

struct WideShrinkTraits {
  static constexpr int kThreads = 128;
  static constexpr int kStep = 64;  // values of K, which the swizzle spans
  static constexpr int kStageBytes = (kWideTileTokens + kWideRows) * kStep * 2;
  static constexpr int kStages = 6;        // two CTAs fit a multiprocessor
  static constexpr int kAlignment = 1024;  // of a stage, for the swizzle
  static constexpr int kSharedBytes = kStages * kStageBytes + kAlignment;
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  static constexpr int kBound = kThreads;
#else
  static constexpr int kBound = 32;  // tells the launcher that the kernel is empty here
#endif
};

// The part of a tile's K that a CTA serves, and of its tokens those whose x the thread copies:
// kCopies of them, kCopyRows apart.
template <int kCopies, int kCopyRows>
struct WidePart {
  int num_tiles, parts, index, part;  // index: of the tile
  int4 tile;                          // a Tile
  int rank, ids[kCopies];

  __device__ __forceinline__ bool exists() const { return index < num_tiles; }

  template <bool kFinal>
  __device__ __forceinline__ void find(const ApplyParams& p, const WideWork& work, int cut) {
    num_tiles = min(read_plan<kFinal>(p.plan.header + kNumWideTiles), work.most_tiles);
    parts = work.split.parts(num_tiles);
    index = small_quotient(cut, parts), part = cut - index * parts;
    tile = make_int4(-1, 0, 0, 0);
    if (exists()) {
      tile = read_plan<kFinal>(reinterpret_cast<const int4*>(p.plan.wide_tiles + index));
    }
    read_tokens<kFinal>(p);
  }
  // Whether that is what the plan says now that it is final; all in one trip to memory.
  __device__ __forceinline__ bool confirm(const ApplyParams& p, const WideWork& work) {
    const int now = min(read_plan<true>(p.plan.header + kNumWideTiles), work.most_tiles);
    int4 there = tile;
    if (exists()) {
      there = read_plan<true>(reinterpret_cast<const int4*>(p.plan.wide_tiles + index));
    }
    read_tokens<true>(p);
    return now == num_tiles && there.x == tile.x && there.y == tile.y && there.z == tile.z;
  }
  // Inside the plan, whatever the tile says.
  template <bool kFinal>
  __device__ __forceinline__ void read_tokens(const ApplyParams& p) {
    const int slots = static_cast<int>(p.plan.num_slots),
              tokens = static_cast<int>(p.plan.max_tokens);
    rank = min(read_plan<kFinal>(p.ranks + min(max(tile.x, 0), slots - 1)), p.max_rank);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int token = static_cast<int>(threadIdx.x) / 8 + i * kCopyRows;
      const int id =
          read_plan<kFinal>(p.plan.permutation + min(max(tile.y + token, 0), tokens - 1));
      // A plan may be for more tokens than this call has.
      ids[i] = token < tile.z && id < p.num_tokens ? id : -1;
    }
  }
};

// A CTA serves a part of a tile's K and some rows of A. Eight threads copy a row's 128 bytes, of
// tokens wherever they lie, some steps ahead, and the products take them from shared memory.
// kBeside: nothing is yet to come, but the kernel before may be at work (beside.h).
template <typename T, bool kBeside = false>
__global__ void __launch_bounds__(WideShrinkTraits::kBound, 2)
    decode_wide_shrink_kernel(const __grid_constant__ ApplyParams p,
                              const __grid_constant__ WideWork work) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Traits = WideShrinkTraits;
  constexpr int kStep = Traits::kStep, kStages = Traits::kStages;
  constexpr int kCopyRows = Traits::kThreads / 8, kCopiesA = kWideRows / kCopyRows,
                kCopiesX = kWideTileTokens / kCopyRows;
  extern __shared__ unsigned char unaligned[];
  unsigned char* shared =
      unaligned + (-device::shared_address(unaligned) & (Traits::kAlignment - 1));
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4,
            q = lane % 4;
  const int chunk = thread % 8, copy_row = thread / 8;
  const int cut = small_quotient(blockIdx.x, work.split.row_groups);
  const int first_row = (blockIdx.x - cut * work.split.row_groups) * kWideRows;
  if (kBeside && blockIdx.x == gridDim.x - 1) {  // one CTA more, which ends when that kernel has
    device::grid_dependency_launch();
    device::grid_dependency_wait();
    return;
  }
  // The plan is looked up before the wait, when it may be yet to be written, and again behind it.
  WidePart<kCopiesX, kCopyRows> at;
  at.template find<kBeside>(p, work, cut);
  if (!kBeside) {
    device::grid_dependency_wait();
  }
  device::grid_dependency_launch();
  if (!kBeside && !at.confirm(p, work)) {
    at.template find<true>(p, work, cut);
  }
  const int slot = at.tile.x, count = at.tile.z, rank = at.rank, padded = padded_rank(rank);
  if (!at.exists() || rank <= 0 || first_row >= padded * p.slices.count) {
    return;
  }
  const float scaling = p.scalings[slot];
  const T* x_rows[kCopiesX];
#pragma unroll
  for (int i = 0; i < kCopiesX; ++i) {
    x_rows[i] = static_cast<const T*>(p.x) + max(at.ids[i], 0) * p.x_stride;
  }
  const T* a_rows[kCopiesA];
  bool has_row[kCopiesA];
#pragma unroll
  for (int i = 0; i < kCopiesA; ++i) {
    const int row = first_row + copy_row + i * kCopyRows;
    const int slice = small_quotient(row, padded), j = row - slice * padded;
    has_row[i] = slice < p.slices.count && j < rank;
    a_rows[i] = static_cast<const T*>(p.a.base[has_row[i] ? slice : 0]) +
                p.a.row_offset(slot, has_row[i] ? slice : 0, rank, has_row[i] ? j : 0);
  }
  const int all_steps = (static_cast<int>(p.in_features) + kStep - 1) / kStep;
  const int begin = small_quotient(all_steps * at.part, at.parts);
  const int steps = small_quotient(all_steps * (at.part + 1), at.parts) - begin;
  const int in_chunk = (copy_row * 8 + (chunk ^ copy_row % 8)) * 16;
  // What has no row becomes zeros, since what lies there may be anything; a row of x without a
  // token reaches sums that nobody reads.
  int k = begin * kStep + 8 * chunk, fetched = 0, fetch_stage = 0;
  const auto fetch = [&] {
    if (fetched < steps) {
      unsigned char* to = shared + fetch_stage + in_chunk;
      const bool inside = k < p.in_features;
#pragma unroll
      for (int i = 0; i < kCopiesX; ++i) {
        if (at.ids[i] >= 0) {
          device::copy_async_16(to + i * kCopyRows * 128, x_rows[i] + (inside ? k : 0),
                                inside ? 16 : 0);
        }
      }
#pragma unroll
      for (int i = 0; i < kCopiesA; ++i) {
        device::copy_async_16(to + (kWideTileTokens + i * kCopyRows) * 128,
                              a_rows[i] + (inside ? k : 0), inside && has_row[i] ? 16 : 0);
      }
      ++fetched;
      k += kStep;
    }
    device::copy_async_commit();
    fetch_stage += Traits::kStageBytes;
    fetch_stage = fetch_stage < kStages * Traits::kStageBytes ? fetch_stage : 0;
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    fetch();
  }
  // sums[4 n + 2 h + e] is token 16 warp + 8 h + g, row 8 n + 2 q + e.
  float sums[32] = {};
  int stage = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    device::copy_async_wait<kStages - 2>();
    device::fence_shared_for_products();
    device::wgmma_wait<0>();
    __syncthreads();  // the step's data are there, and the products of the one before are done
    fetch();
    const uint64_t tokens = device::swizzled_tile(shared + stage);
    const uint64_t weights = device::swizzled_tile(shared + stage + kWideTileTokens * 128);
    device::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kStep / 16; ++kk) {
      device::wgmma<T, 64>(sums, tokens + 2 * kk, weights + 2 * kk);
    }
    device::wgmma_commit();
    stage += Traits::kStageBytes;
    stage = stage < kStages * Traits::kStageBytes ? stage : 0;
  }
  device::wgmma_wait<0>();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int token = 16 * warp + 8 * h + g;
    float* to = const_cast<float*>(work.row_of_part(cut, token)) + first_row + 4 * q;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const float* sum = sums + 8 * m + 2 * h;
      if (token < count && first_row + 16 * m < padded * p.slices.count) {
        *reinterpret_cast<float4*>(to + 16 * m) =
            make_float4(sum[0] * scaling, sum[1] * scaling, sum[4] * scaling, sum[5] * scaling);
      }
    }
  }
#endif
}

}  // namespace lora_ext::cuda
