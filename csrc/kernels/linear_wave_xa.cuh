// xa of a batch as linear_wave wants it, from what the decode shrink has left: a CTA for each tile
// of the plan, and more of them for the tokens that have no adapter, whose columns are zeros too.
#pragma once

#include "common/vec.cuh"
#include "kernels/linear_ranks.cuh"
#include "kernels/linear_wave_shared.cuh"

namespace lora_ext::cuda {

struct alignas(64) WaveXaParams {
  DecodeBatch batch;
  unsigned char* xa;
  WaveEntries* entries;
};

constexpr int kWaveXaThreads = kTileTokens * kLinearWaveRank;

// The shrink, which is the kernel before, has waited for all before it, so that all but its sums
// may be read at once.
template <int kTokens>
__global__ void __launch_bounds__(kWaveXaThreads)
    linear_wave_xa_kernel(const __grid_constant__ WaveXaParams params) {
#if __CUDA_ARCH__ >= 900
  const DecodeBatch& p = params.batch;
  __shared__ WaveEntries entries;
  __shared__ int own_entry, num_covered;
  __shared__ bool covered[kTileTokens];
  const int thread = threadIdx.x, block = blockIdx.x, tiles = p.tile_capacity;
  const int place = thread / kLinearWaveRank, j = thread % kLinearWaveRank;
  device::grid_dependency_launch();
  if (thread < 32) {
    int count = 0, last = -1, end = 0;
    for (int first = 0; first < tiles; first += 32) {
      const int index = first + thread;
      int4 tile = make_int4(-1, 0, 0, 0);
      if (index < tiles) {
        tile = read_plan<true>(reinterpret_cast<const int4*>(p.tiles + index));
      }
      const int slot = tile.x;
      const int rank = slot >= 0 ? min(read_plan<true>(p.ranks + slot), p.max_rank) : 0;
      int before = __shfl_up_sync(0xffffffffu, slot, 1);
      before = thread == 0 ? last : before;
      const bool begins = rank > 0 && slot != before;
      const unsigned beginners = __ballot_sync(0xffffffffu, begins);
      const int at = count + __popc(beginners & ((2u << thread) - 1)) - 1;
      if (begins && at < kLinearWaveMaxSlots) {
        entries.of[at] = {slot, rank};
      }
      if (index == block) {
        own_entry = rank > 0 ? at : -1;
      }
      count += __popc(beginners);
      last = __shfl_sync(0xffffffffu, slot, 31);
      end = max(end, slot >= 0 ? tile.y + tile.z : 0);
    }
    end = __reduce_max_sync(0xffffffffu, end);
    if (thread == 0) {
      entries.count = min(count, kLinearWaveMaxSlots);
      num_covered = min(end, p.max_tokens);
    }
  }
  if (j == 0) {
    covered[place] = false;
  }
  __syncthreads();
  int entry = -1, token = -1;
  if (block < tiles) {
    entry = own_entry;
    const int4 tile = read_plan<true>(reinterpret_cast<const int4*>(p.tiles + block));
    token = tile.x >= 0 && place < tile.z ? read_plan<true>(p.permutation + tile.y + place) : -1;
  } else {  // of tokens that are in no tile
    const int first = (block - tiles) * kTileTokens;
    for (int i = thread; i < num_covered; i += kWaveXaThreads) {
      const int at = read_plan<true>(p.permutation + i) - first;
      if (at >= 0 && at < kTileTokens) {
        covered[at] = true;
      }
    }
    __syncthreads();
    token = covered[place] ? -1 : first + place;
  }
  token = token < p.num_tokens ? token : -1;
  const TileCuts cuts = p.split_rules.cuts(read_num_tiles(p));
  device::grid_dependency_wait();
  if (block == 0 && thread == 0) {
    *params.entries = entries;
  }
  if (token < 0) {
    return;
  }
  const int even = (entries.count + kWaveStepSlots - 1) / kWaveStepSlots * kWaveStepSlots;
  for (int slice = 0; slice < p.num_slices; ++slice) {
    float value = 0;
    if (entry >= 0) {
      const int rank = entries.of[entry].rank;
      const TileShares shares = tile_shares(p, rank, cuts.parts(block));
      const float* const from[1] = {partial_products(p, cuts.first_part(block)) +
                                    (slice * rank + j) * kTileTokens + place};
      const int pieces[1] = {j < rank ? shares.pieces : 0}, stride[1] = {shares.stride};
      float sum[1] = {};
      add_up_parts(from, pieces, stride, sum);
      value = j < rank ? sum[0] * read_plan<true>(p.scalings + entries.of[entry].slot) : 0.0f;
    }
    for (int e = 0; e < even; ++e) {
      __nv_bfloat16 high, low;
      device::split(e == entry ? value : 0.0f, high, low);
      const auto to = [&](int half) {
        return reinterpret_cast<__nv_bfloat16*>(params.xa +
                                                WaveXa<kTokens>::at(slice, e, token, half, j));
      };
      *to(0) = high;
      *to(1) = low;
    }
  }
#endif
}

}  // namespace lora_ext::cuda
