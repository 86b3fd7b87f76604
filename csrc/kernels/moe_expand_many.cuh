// The expand of tiles that may well have many pairs: a CTA of four warps takes a tile and four
// units of 64 columns, whose B it brings to shared memory once. A warp takes 16 pairs, keeps their
// xa in registers, and goes through the units; with no more than 16 or 32 pairs the warps of a
// group of pairs share the units. The y of a unit is on its way while the one before is computed,
// and comes and goes by whole lines, through shared memory.
#pragma once

#include "kernels/moe_expand_tiles.cuh"

namespace lora_ext::cuda {

constexpr int kGroupPairs = 16;  // of a warp

// A CTA's shared memory: the weights of each unit, then two pieces of y, of 16
// pairs by 64 columns, for each warp.
template <int kChunk, int kHeld>
struct MoeManyTraits {
  static constexpr int kUnitBytes = UnitWeights<kChunk, kHeld>::kBytes;
  static constexpr int kWeightBytes = kMoeWarps * kUnitBytes;
  static constexpr int kRowBytes = kUnitColumns * 2;
  static constexpr int kPieceBytes = kGroupPairs * kRowBytes;
  static constexpr int kSharedBytes = kWeightBytes + 2 * kMoeWarps * kPieceBytes;

  // Neither the eight lanes of a row nor those of a fragment meet in a bank.
  __device__ static int output_at(int row, int chunk) {
    return row * kRowBytes + (chunk ^ (row & 6)) * 16;
  }
};

template <typename T, int kChunk>
constexpr int moe_many_min_blocks() {
  return (kChunk == 4 ? 5 : 4) - (device::kNeedsScale<T> ? 1 : 0);
}

// For y of 16 bits, where y and B allow 16-byte accesses and no slot has more ranks than kHeld
// steps hold.
template <typename T, typename Y, int kChunk, int kHeld>
__global__ void __launch_bounds__(kMoeThreads, (moe_many_min_blocks<T, kChunk>()))
    moe_expand_many_kernel(const __grid_constant__ MoeExpandParams p) {
  static_assert(sizeof(Y) == 2);
  using Traits = MoeManyTraits<kChunk, kHeld>;
  using Weights = UnitWeights<kChunk, kHeld>;
  constexpr int kSpan = 4 * kChunk;
  extern __shared__ __align__(1024) unsigned char copies[];
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0);  // so the compiler knows it is one
  const int row0 = lane / 8, chunk = lane % 8;                   // of y, as whole lines
  unsigned char* const pieces = copies + Traits::kWeightBytes + warp * 2 * Traits::kPieceBytes;
  struct Place {
    int slice, column;  // slice num_slices: none
  };
  const auto place_of = [&](int unit) {
    Place place{0, static_cast<int>(blockIdx.x) * kMoeWarps + unit};
    while (place.slice < p.num_slices && place.column >= p.slices[place.slice].units) {
      place.column -= p.slices[place.slice++].units;
    }
    place.column *= kUnitColumns;
    return place;
  };
  const Place own = place_of(warp);
  device::grid_dependency_launch();
  const int num_tiles = p.routing.num_tiles();
  const int32_t* permutation = p.routing.permutation();
  MoeTile tile = p.routing.tile(blockIdx.y);
  // Of up to 32 slots, beside the first tile: B and the pairs wait for one read less.
  const bool few_slots = p.num_slots <= 32;
  const int lane_rank = few_slots && lane < p.num_slots ? p.ranks[lane] : 0;
#pragma unroll 1
  for (int index = blockIdx.y; index < num_tiles; index += gridDim.y) {
    if (index != blockIdx.y) {
      tile = p.routing.tile(index);
    }
    if (!is_valid(tile, p.num_slots, p.num_experts)) {
      continue;
    }
    const int groups = tile.count <= kGroupPairs ? 1 : tile.count <= 2 * kGroupPairs ? 2 : 4;
    const int first = warp % groups * kGroupPairs, unit_step = kMoeWarps / groups;
    int pair = lane < kGroupPairs && first + lane < tile.count
                   ? permutation[tile.start + first + lane]
                   : -1;
    const int slot_rank =
        few_slots ? __shfl_sync(kAllLanes, lane_rank, tile.slot) : p.ranks[tile.slot];
    const int rank = min(slot_rank, p.max_rank);
    if (rank <= 0) {
      continue;
    }
    if (own.slice < p.num_slices) {
      const MoeExpandSlice& s = p.slices[own.slice];
      const int column = own.column + 8 * g;
      const T* b = static_cast<const T*>(s.b) + tile.slot * s.slot_stride +
                   tile.expert * s.expert_stride + (s.first_row + column) * s.row_stride;
      Weights::copy(copies + warp * Traits::kUnitBytes, b, s.row_stride, rank, s.width - column, g,
                    q);
    }
    pair = pair < p.num_pairs ? pair : -1;
    int line_pairs[kGroupPairs / 4];
#pragma unroll
    for (int i = 0; i < kGroupPairs / 4; ++i) {
      line_pairs[i] = __shfl_sync(kAllLanes, pair, row0 + 4 * i);
    }
    const auto copy_outputs = [&](int unit, unsigned char* to) {
      const Place place = place_of(unit);
      if (unit < kMoeWarps && place.slice < p.num_slices) {
        const MoeExpandSlice& s = p.slices[place.slice];
        const Y* y = static_cast<const Y*>(p.y) + s.column_start + place.column + 8 * chunk;
#pragma unroll
        for (int i = 0; i < kGroupPairs / 4; ++i) {
          if (line_pairs[i] >= 0 && place.column + 8 * chunk < s.width) {
            device::copy_async_16(to + Traits::output_at(row0 + 4 * i, chunk),
                                  y + line_pairs[i] * p.y_stride, 16);
          }
        }
      }
      device::copy_async_commit();
    };
    copy_outputs(warp / groups, pieces);
    copy_outputs(warp / groups + unit_step, pieces + Traits::kPieceBytes);
    device::grid_dependency_wait();
    const bool both = first + 8 < tile.count;  // else only the first eight pairs, if any
    const int fragment_pairs[2] = {__shfl_sync(kAllLanes, pair, g),
                                   __shfl_sync(kAllLanes, pair, 8 + g)};
    SplitChunk<T, kChunk> xa[2][kHeld];
    int max_bits[2] = {0, 0}, held_slice = -1, piece = 0;
    bool arrived = groups == 1;  // the weights of the other warps
#pragma unroll 1
    for (int unit = warp / groups; unit < kMoeWarps; unit += unit_step, piece ^= 1) {
      const Place place = place_of(unit);
      const bool exists = place.slice < p.num_slices && first < tile.count;
      if (exists && place.slice != held_slice) {
        held_slice = place.slice;
        const float* rows[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          rows[n] = fragment_pairs[n] >= 0
                        ? p.xa + fragment_pairs[n] * p.xa_row_stride + held_slice * p.xa_rank_stride
                        : nullptr;
        }
        float values[2][kHeld][kChunk] = {};
        if (both) {
          load_held<2, kChunk, kHeld>(values, p, rows, q * kChunk, rank);
        } else {
          load_held<1, kChunk, kHeld>(values, p, rows, q * kChunk, rank);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          if constexpr (device::kNeedsScale<T>) {
            max_bits[n] = 0;
#pragma unroll
            for (int step = 0; step < kHeld; ++step) {
#pragma unroll
              for (int e = 0; e < kChunk; ++e) {
                max_bits[n] = max(max_bits[n], __float_as_int(fabsf(values[n][step][e])));
              }
            }
            max_bits[n] = max(max_bits[n], __shfl_xor_sync(kAllLanes, max_bits[n], 1));
            max_bits[n] = max(max_bits[n], __shfl_xor_sync(kAllLanes, max_bits[n], 2));
          }
          const float scale = device::kNeedsScale<T> ? device::scale_down(max_bits[n]) : 1.0f;
#pragma unroll
          for (int step = 0; step < kHeld; ++step) {
            xa[n][step].set(values[n][step], scale);
          }
        }
      }
      device::copy_async_wait<1>();  // the weights, and this unit's y
      if (arrived) {
        __syncwarp();
      } else {
        __syncthreads();
        arrived = true;
      }
      unsigned char* const outputs_at = pieces + piece * Traits::kPieceBytes;
      if (exists) {
        const MoeExpandSlice& s = p.slices[place.slice];
        const unsigned char* weights_at = copies + unit * Traits::kUnitBytes;
        float acc[2][4][4] = {};
#pragma unroll
        for (int step = 0; step < kHeld; ++step) {
          if (step == 0 || step * kSpan < rank) {
#pragma unroll
            for (int block = 0; block < 4; block += 2) {  // two at a time: registers
              device::Chunk<T, kChunk> weights[4];
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                read_chunk(weights[i], weights_at + Weights::at(2 * block + i, step, g, q));
              }
              multiply<T, kChunk, 2>(acc[0] + block, weights, xa[0][step]);
              if (both) {
                multiply<T, kChunk, 2>(acc[1] + block, weights, xa[1][step]);
              }
            }
          }
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          if (n > 0 && !both) {
            break;
          }
#pragma unroll
          for (int o = 0; o < 2; ++o) {
            const float scale_up =
                device::kNeedsScale<T>
                    ? device::scale_up(__shfl_sync(kAllLanes, max_bits[n], 4 * (2 * q + o)))
                    : 1.0f;
            float delta[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              delta[i] = acc[n][i / 2][i % 2 * 2 + o] * scale_up;
            }
            device::Outputs<Y> outputs;
            Y* at = reinterpret_cast<Y*>(outputs_at + Traits::output_at(8 * n + 2 * q + o, g));
            outputs.load(at);
            outputs.add(delta);
            outputs.store(at);
          }
        }
        __syncwarp();
        Y* const y = static_cast<Y*>(p.y) + s.column_start + place.column + 8 * chunk;
#pragma unroll
        for (int i = 0; i < kGroupPairs / 4; ++i) {
          if (line_pairs[i] >= 0 && place.column + 8 * chunk < s.width) {
            device::Outputs<Y> outputs;
            outputs.load(
                reinterpret_cast<const Y*>(outputs_at + Traits::output_at(row0 + 4 * i, chunk)));
            outputs.store(y + line_pairs[i] * p.y_stride);
          }
        }
      }
      copy_outputs(unit + 2 * unit_step, outputs_at);
    }
    device::copy_async_wait<0>();
    if (groups > 1) {
      __syncthreads();  // the weights are filled again
    } else {
      __syncwarp();
    }
  }
}

}  // namespace lora_ext::cuda
