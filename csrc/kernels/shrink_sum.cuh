// The second kernel of the shrink where it cuts a few tiles into many parts: adds the parts of a
// tile up, on all multiprocessors. CTAs of the expand, each of which needs a tile's whole xa, would
// read all parts again.
#pragma once

#include "common/ptx.cuh"
#include "kernels/prefill_heuristics.h"
#include "kernels/shrink_wgmma.cuh"

namespace lora_ext::cuda {

constexpr int kSumThreads = 256, kSumBlocks = 4;  // on a multiprocessor

// Four lanes serve 16 columns of a token. Where parts are more than a thread should have on their
// way at once, four such groups of lanes share them.
__global__ void __launch_bounds__(kSumThreads)
    shrink_sum_kernel(const __grid_constant__ ShrinkParams p) {
  constexpr int kAtOnce = 4;
  device::warm_parameters<kSumThreads>(p);
  device::grid_dependency_launch();
  const int lane = threadIdx.x % 32, warp = blockIdx.x * (kSumThreads / 32) + threadIdx.x / 32;
  const int num_tiles = min(p.plan.header[kNumWideTiles], p.layout.most_tiles);
  if (num_tiles == 0) {
    return;
  }
  const XaLayout::Cut cut = p.layout.cut(num_tiles);
  const int sharers = cut.used > kAtOnce * num_tiles ? 4 : 1, sharer = lane / 4 & (sharers - 1);
  const int units_of_warp = 8 / sharers, unit_of_lane = lane / (4 * sharers);
  const int columns = static_cast<int>(p.xa_stride), row_units = columns / 16;
  const int units = num_tiles * kWideTileTokens * row_units;
  const int64_t stride = int64_t{kWideTileTokens} * columns;
  auto* xa = static_cast<float*>(p.xa);
  bool waited = false;
#pragma unroll 1
  for (int first = warp * units_of_warp; first < units;
       first += gridDim.x * (kSumThreads / 32) * units_of_warp) {
    const int unit = first + unit_of_lane;  // units are a multiple of 64
    const int row = unit / row_units, column = (unit - row * row_units) * 16 + lane % 4 * 4;
    const int index = row / kWideTileTokens, token = row % kWideTileTokens;
    const Tile tile = p.plan.wide_tiles[index];
    const int rank = min(p.ranks[tile.slot], p.max_rank);
    const bool used = token < tile.count && column < XaLayout::padded(rank) * p.num_slices;
    const int first_part = cut.part_of(index * p.layout.steps);
    const int parts = cut.part_of((index + 1) * p.layout.steps - 1) - first_part + 1;
    const float* from = xa + int64_t{p.layout.place(first_part, index)} * stride +
                        int64_t{token} * columns + column;
    if (!waited) {
      device::grid_dependency_wait();  // the parts are all that is yet to come
      waited = true;
    }
    float4 sum = make_float4(0, 0, 0, 0);
    if (used) {
#pragma unroll 1
      for (int part = sharer; part < parts; part += kAtOnce * sharers) {
        float4 next[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          next[i] = __ldcg(
              reinterpret_cast<const float4*>(from + min(part + i * sharers, parts - 1) * stride));
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {  // those past the last part count as 0
          device::add_masked(sum, next[i], (part + i * sharers - parts) >> 31);
        }
      }
    }
    for (int distance = 4; distance < 4 * sharers; distance *= 2) {
      sum.x += __shfl_xor_sync(0xffffffffu, sum.x, distance);
      sum.y += __shfl_xor_sync(0xffffffffu, sum.y, distance);
      sum.z += __shfl_xor_sync(0xffffffffu, sum.z, distance);
      sum.w += __shfl_xor_sync(0xffffffffu, sum.w, distance);
    }
    if (used && sharer == 0) {
      *reinterpret_cast<float4*>(xa + int64_t{row} * columns + column) =
          p.layout.halves ? split_sums<__nv_bfloat16>(sum, column, rank) : sum;
    }
  }
}

}  // namespace lora_ext::cuda
