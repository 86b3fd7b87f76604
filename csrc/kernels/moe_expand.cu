// y += xa B^T for tiles of pairs of one (slot, expert): what moves is B, and y read and written.
//
// With few pairs in a batch, here: a warp serves one tile and one unit of columns, and needs no
// other warp, so there is no barrier. B comes by asynchronous copies to shared memory, where the
// warp reads it for every eight pairs: on its way it takes no registers, and no cache either, which
// the shrink beside it leaves little of. The next eight rows of y and of xa are on their way
// meanwhile. With many pairs: moe_expand_many.cuh, the same products in the same order, and on
// sm_90a for ranks above 16 moe_expand_wgmma.cuh, in another order, whatever the addresses are. In
// all, B and the first rows of y are asked for before the wait for the shrink.
#include "kernels/moe_expand_many.cuh"
#include "kernels/moe_expand_wgmma.cuh"
#include "kernels/wide_apply.h"

namespace lora_ext::cuda {
namespace {

constexpr int kRound = 8;  // pairs at a time

// Of a block: the weights of each warp's kUnits units.
template <int kChunk, int kHeld, int kUnits = 1>
constexpr int held_bytes() {
  return kMoeWarps * kUnits * UnitWeights<kChunk, kHeld>::kBytes;
}

// As many CTAs on an SM as registers hold without spilling.
template <typename T, typename Y, int kChunk, bool kAll, bool kVector, int kUnits, bool kShares,
          bool kAhead>
constexpr int expand_min_blocks() {
  if (kUnits == 2) {
    return (kChunk == 4 ? kAhead ? 4 : 6 : kAhead ? 3 : 4) - (device::kNeedsScale<T> ? 1 : 0);
  }
  const int fewer = sizeof(Y) == 4                                  ? kChunk == 4 ? 2 : 1
                    : device::kNeedsScale<T> || !kVector || kShares ? 1
                                                                    : 0;
  return !kAll ? 3 - (sizeof(Y) == 4 ? 1 : 0) : (kChunk == 4 ? 6 : 4) - fewer;
}

// kChunk: neighbouring ranks that a lane holds, 4 for pools of rank up to 16, else 8. kAll: no slot
// has more ranks than are held; else the others' weights are read again for every eight pairs.
// kUnits: neighbouring units of columns that a warp takes. kShares: knows how lanes without a pair
// help to add up the parts of K, which costs the others. kAhead: asks for y and xa of the next
// eight pairs before it multiplies; without, registers hold half as many CTAs more.
template <typename T, typename Y, int kChunk, int kHeld, bool kAll, bool kVector, int kUnits = 1,
          bool kShares = false, bool kAhead = true>
__global__ void __launch_bounds__(
    kMoeThreads, (expand_min_blocks<T, Y, kChunk, kAll, kVector, kUnits, kShares, kAhead>()))
    moe_expand_kernel(const __grid_constant__ MoeExpandParams p) {
  static_assert(kUnits == 1 || (kVector && kAll));
  using Weights = UnitWeights<kChunk, kHeld>;
  constexpr int kSpan = 4 * kChunk;
  extern __shared__ __align__(1024) unsigned char copies[];
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  // The warp's weights, or of four ranks a lane its own: [unit][column][thread].
  unsigned char* const own =
      copies + (kChunk == 4 ? threadIdx.x * 8 : threadIdx.x / 32 * kUnits * Weights::kBytes);
  const auto weights_at = [&](int u, int step, int i) {
    return own + (kChunk == 4 ? (8 * u + i) * kMoeThreads * 8
                              : u * Weights::kBytes + Weights::at(i, step, g, q));
  };
  int unit = blockIdx.x * kMoeWarps + threadIdx.x / 32, slice = 0;
  while (slice < p.num_slices && unit >= p.slices[slice].units) {
    unit -= p.slices[slice++].units;
  }
  if (slice == p.num_slices) {
    return;
  }
  device::grid_dependency_launch();
  const MoeExpandSlice& s = p.slices[slice];
  const int column = unit * kUnits * kUnitColumns + 8 * g, width = s.width;
  const int64_t y_stride = p.y_stride, column_stride = kVector ? 1 : p.column_stride;
  Y* y = static_cast<Y*>(p.y) + s.column_start + column * column_stride;
  const int num_tiles = p.routing.num_tiles();
  const int32_t* permutation = p.routing.permutation();
  MoeTile tile = p.routing.tile(blockIdx.y);
  for (int index = blockIdx.y; index < num_tiles; index += gridDim.y) {
    if (index != blockIdx.y) {
      tile = p.routing.tile(index);
    }
    if (!is_valid(tile, p.num_slots, p.num_experts)) {
      continue;
    }
    // The tile's pairs, two to a lane; -1: none.
    int pairs[2];
    const auto load_pairs = [&] {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = 32 * i + lane;
        pairs[i] = at < tile.count ? permutation[tile.start + at] : -1;
      }
    };
    // Beside the rank, or, of four ranks a lane, behind B, which had better come first then.
    constexpr bool kPairsFirst = kChunk == 8 || !kAhead;
    if constexpr (kPairsFirst) {
      load_pairs();
    }
    const int rank = min(p.ranks[tile.slot], p.max_rank);
    if (rank <= 0) {
      continue;
    }
    const int64_t row_stride = s.row_stride;
    Weights::meet();  // no lane reads those of the tile before any more
    const T* b = static_cast<const T*>(s.b) + tile.slot * s.slot_stride +
                 tile.expert * s.expert_stride + (s.first_row + column) * row_stride;
    const auto load_weights = [&](device::Chunk<T, kChunk>(&to)[8], int j) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        load_ranks<T, kChunk, kVector>(to[i], b + i * row_stride, j + q * kChunk, rank,
                                       column + i < width);
      }
    };
    if constexpr (kVector && kChunk == 4) {
      const int valid = min(max(rank - q * kChunk, 0), kChunk);
#pragma unroll
      for (int i = 0; i < 8 * kUnits; ++i) {
        const int shift = i / 8 * kUnitColumns + i % 8;
        device::copy_async_8<true>(weights_at(0, 0, i), b + shift * row_stride + q * kChunk,
                                   column + shift < width ? 2 * valid : 0);
      }
    } else if constexpr (kVector) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        Weights::copy(own + u * Weights::kBytes, b + u * kUnitColumns * row_stride, row_stride,
                      rank, width - column - u * kUnitColumns, g, q);
      }
    } else {
#pragma unroll
      for (int step = 0; step < kHeld; ++step) {
        device::Chunk<T, kChunk> weights[8];
        load_weights(weights, step * kSpan);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          write_chunk(weights_at(0, step, i), weights[i]);
        }
      }
    }
    device::copy_async_commit();
    if constexpr (!kPairsFirst) {
      load_pairs();
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      pairs[i] = pairs[i] < p.num_pairs ? pairs[i] : -1;
    }
    const auto pair_of = [&](int round, int i) {
      return __shfl_sync(kAllLanes, round < 4 ? pairs[0] : pairs[1], (kRound * round + i) % 32);
    };
    // Output o of a lane: pair 2 q + o of the round, eight columns.
    device::Outputs<Y> next[kUnits][2];
    const auto load_y = [&](int round) {
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        const int pair = pair_of(round, 2 * q + o);
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          if (kVector && pair >= 0 && column + u * kUnitColumns < width) {
            next[u][o].load(y + pair * y_stride + u * kUnitColumns);
          }
        }
      }
    };
    load_y(0);
    device::grid_dependency_wait();

    const int rounds = (tile.count + kRound - 1) / kRound;
    struct {
      const float* row;
      int rank;
      float values[kHeld][kChunk];
    } next_xa, xa;
    const auto load_next_xa = [&](int round) {
      const int pair = pair_of(round, g);
      next_xa.row = pair >= 0 ? p.xa + pair * p.xa_row_stride + slice * p.xa_rank_stride : nullptr;
      next_xa.rank = pair >= 0 ? rank : 0;
      if constexpr (kHeld * kChunk == 4) {  // one load of a split: four splits at a time
        load_xa<kChunk>(next_xa.values[0], p, next_xa.row, q * kChunk, next_xa.rank);
      } else {
        load_held<1, kChunk, kHeld, 4>(&next_xa.values, p, &next_xa.row, q * kChunk, rank);
      }
    };
    if (kShares && p.shares && tile.count <= 4) {
      const int sharing = tile.count == 1 ? 1 : tile.count == 2 ? 2 : 4;
      const int pair = pair_of(0, g % sharing);
      const float* const row =
          pair >= 0 ? p.xa + pair * p.xa_row_stride + slice * p.xa_rank_stride : nullptr;
      load_shared<kChunk, kHeld>(next_xa.values, p, row, q * kChunk, rank, sharing);
      next_xa.row = row;
      next_xa.rank = row != nullptr && g < sharing ? rank : 0;
    } else {
      load_next_xa(0);
    }
    device::copy_async_wait<0>();
    Weights::meet();
    for (int round = 0; round < rounds; ++round) {
      if (!kAhead && round > 0) {
        load_y(round);
        load_next_xa(round);
      }
      xa = next_xa;
      device::Outputs<Y> outputs[kUnits][2];
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        outputs[u][0] = next[u][0], outputs[u][1] = next[u][1];
      }
      if (kAhead && round + 1 < rounds) {
        load_y(round + 1);
        load_next_xa(round + 1);
      }
      int max_bits = 0;
      if constexpr (device::kNeedsScale<T>) {
        for (int j = q * kChunk; j < xa.rank; j += kSpan) {
          float part[kChunk];
          load_xa<kChunk>(part, p, xa.row, j, xa.rank);
#pragma unroll
          for (int e = 0; e < kChunk; ++e) {
            max_bits = max(max_bits, __float_as_int(fabsf(part[e])));
          }
        }
        max_bits = max(max_bits, __shfl_xor_sync(kAllLanes, max_bits, 1));
        max_bits = max(max_bits, __shfl_xor_sync(kAllLanes, max_bits, 2));
      }
      const float scale = device::kNeedsScale<T> ? device::scale_down(max_bits) : 1.0f;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int first = column + u * kUnitColumns;
        float acc[4][4] = {};
#pragma unroll
        for (int step = 0; step < kHeld; ++step) {
          if (step == 0 || step * kSpan < rank) {
            device::Chunk<T, kChunk> weights[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              read_chunk(weights[i], weights_at(u, step, i));
            }
            SplitChunk<T, kChunk> split;
            split.set(xa.values[step], scale);
            multiply<T, kChunk, 4>(acc, weights, split);
          }
        }
        for (int j = kHeld * kSpan; !kAll && j < rank; j += kSpan) {
          device::Chunk<T, kChunk> more[8];
          float part[kChunk];
          load_weights(more, j);
          load_xa<kChunk>(part, p, xa.row, j + q * kChunk, xa.rank);
          SplitChunk<T, kChunk> split;
          split.set(part, scale);
          multiply<T, kChunk, 4>(acc, more, split);
        }
#pragma unroll
        for (int o = 0; o < 2; ++o) {
          const int to_pair = pair_of(round, 2 * q + o);
          const float scale_up =
              device::kNeedsScale<T>
                  ? device::scale_up(__shfl_sync(kAllLanes, max_bits, 4 * (2 * q + o)))
                  : 1.0f;
          if (to_pair < 0 || first >= width) {
            continue;
          }
          float delta[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            delta[i] = acc[i / 2][i % 2 * 2 + o] * scale_up;
          }
          Y* to = y + to_pair * y_stride + u * kUnitColumns * column_stride;
          if constexpr (kVector) {
            outputs[u][o].add(delta);
            outputs[u][o].store(to);
          } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              if (first + i < width) {
                Y* at = to + i * column_stride;
                *at = device::from_float<Y>(device::to_float(*at) + delta[i]);
              }
            }
          }
        }
      }
    }
  }
}

// The kernel of ranks that are held. The order of its sums follows from the shape alone, so where
// it may share, every variant can.
template <typename T, typename Y, int kChunk, int kHeld>
auto held_kernel(bool vector, bool shares) {
  if (!vector) {
    return moe_expand_kernel<T, Y, kChunk, kHeld, true, false, 1, true>;
  }
  if constexpr (sizeof(Y) == 2) {
    if (!shares) {
      return moe_expand_kernel<T, Y, kChunk, kHeld, true, true>;
    }
  }
  return moe_expand_kernel<T, Y, kChunk, kHeld, true, true, 1, true>;
}

template <typename T, typename Y, int kChunk>
auto two_units_kernel(bool dense) {
  return dense ? moe_expand_kernel<T, Y, kChunk, 1, true, true, 2, false, false>
               : moe_expand_kernel<T, Y, kChunk, 1, true, true, 2>;
}

enum class Way { kFew, kMany, kWgmma };

template <typename T, typename Y>
cudaError_t launch(const MoeExpandParams& params, bool vector, Way way, int units, bool dense,
                   LaunchShape shape, void* stream) {
  const auto launch_held = [&](auto kernel, int bytes) {
    shape.shared_bytes = bytes;
    return launch_kernel(kernel, shape, stream, params);
  };
  // The order of the sum over ranks follows from kChunk, so that depends on the ranks alone.
  const bool narrow = params.max_rank <= 16;
  const bool one_step = params.max_rank <= 32;
  if constexpr (sizeof(Y) == 2) {
    if (way == Way::kWgmma) {
      const auto kernel = vector     ? one_step ? moe_expand_wgmma_kernel<T, Y, 32, true>
                                                : moe_expand_wgmma_kernel<T, Y, 64, true>
                              : one_step ? moe_expand_wgmma_kernel<T, Y, 32, false>
                                     : moe_expand_wgmma_kernel<T, Y, 64, false>;
      return launch_held(kernel, kMoeWgmmaBytes);
    }
    if (way == Way::kMany) {
      return narrow     ? launch_held(moe_expand_many_kernel<T, Y, 4, 1>,
                                      MoeManyTraits<4, 1>::kSharedBytes)
             : one_step ? launch_held(moe_expand_many_kernel<T, Y, 8, 1>,
                                      MoeManyTraits<8, 1>::kSharedBytes)
                        : launch_held(moe_expand_many_kernel<T, Y, 8, 2>,
                                      MoeManyTraits<8, 2>::kSharedBytes);
    }
  }
  if constexpr (sizeof(Y) == 2) {
    if (units == 2) {
      return narrow ? launch_held(two_units_kernel<T, Y, 4>(dense), held_bytes<4, 1, 2>())
                    : launch_held(two_units_kernel<T, Y, 8>(dense), held_bytes<8, 1, 2>());
    }
  }
  if (narrow) {
    return launch_held(held_kernel<T, Y, 4, 1>(vector, params.shares), held_bytes<4, 1>());
  }
  if (one_step) {
    return launch_held(held_kernel<T, Y, 8, 1>(vector, params.shares), held_bytes<8, 1>());
  }
  if (params.max_rank <= 64) {
    return launch_held(held_kernel<T, Y, 8, 2>(vector, params.shares), held_bytes<8, 2>());
  }
  return launch_held(vector ? moe_expand_kernel<T, Y, 8, 1, false, true>
                            : moe_expand_kernel<T, Y, 8, 1, false, false>,
                     held_bytes<8, 1>());
}

}  // namespace

bool moe_expand_is_vector(const MoeApplyParams& p, int chunk) {
  bool vector = p.column_stride == 1 && is_multiple(p.y, p.y_stride, 8, 16) &&
                is_multiple(p.b, p.slices.count, chunk, 2 * chunk);
  for (int i = 0; i < p.slices.count; ++i) {
    vector &= p.column_start[i] % 8 == 0 && (p.slices.offset[i + 1] - p.slices.offset[i]) % 8 == 0;
  }
  return vector;
}

cudaError_t moe_expand(const MoeApplyParams& p, const MoeShrinkConfig& config) {
  const MoeWorkspace at(p, config.splits);
  MoeExpandParams params{};
  params.routing = moe_routing(p);
  params.ranks = p.ranks;
  params.xa = static_cast<const float*>(p.workspace);
  params.y = p.y;
  params.y_stride = p.y_stride;
  params.column_stride = p.column_stride;
  params.xa_row_stride = at.row_stride;
  params.xa_plane = at.plane;
  params.num_slots = p.num_slots;
  params.num_experts = p.num_experts;
  params.num_pairs = static_cast<int32_t>(p.num_pairs);
  params.max_rank = p.max_rank;
  params.splits = config.splits;
  params.xa_rank_stride = static_cast<int32_t>(at.rank_stride);
  params.num_slices = p.slices.count;
  const bool narrow = p.max_rank <= 16, vector = moe_expand_is_vector(p, narrow ? 4 : 8);
  // By the shape alone, and whether it can be.
  const int sm_count = device_properties().sm_count;
  const bool many_by_shape =
      moe_expand_is_many(p.num_pairs, moe_groups(p), p.max_rank, params.splits);
  const int units_by_shape =
      moe_expand_units(p.num_pairs, moe_groups(p), p.slices.offset[p.slices.count], p.max_rank,
                       params.splits, sm_count);
  const bool half_y = p.y_dtype != DType::kFloat32;
  const Way way = !half_y || !many_by_shape        ? Way::kFew
                  : p.max_rank > 16 && has_wgmma() ? Way::kWgmma
                  : vector                         ? Way::kMany
                                                   : Way::kFew;
  const int warp_units = vector && half_y && way == Way::kFew ? units_by_shape : 1;
  params.shares =
      !many_by_shape && units_by_shape == 1 && moe_expand_shares_splits(params.splits, p.max_rank);
  const int block_units = way == Way::kWgmma ? 1 : kMoeWarps;
  const int unit_columns = way == Way::kWgmma ? kMoeWgmmaColumns : warp_units * kUnitColumns;
  int units = 0;
  for (int i = 0; i < p.slices.count; ++i) {
    MoeExpandSlice& slice = params.slices[i];
    slice.b = p.b.base[i];
    slice.slot_stride = p.b.slot_stride[i];
    slice.expert_stride = p.b.expert_stride[i];
    slice.row_stride = p.b.row_stride[i];
    slice.first_row = p.b.first_row[i];
    slice.column_start = p.column_start[i];
    slice.width = p.slices.offset[i + 1] - p.slices.offset[i];
    slice.units = static_cast<int32_t>(ceil_div(slice.width, unit_columns));
    units += slice.units;
  }
  LaunchShape shape{};
  const int blocks = static_cast<int>(ceil_div(units, block_units));
  const bool dense = warp_units == 2 && moe_expand_is_dense(p.num_pairs, moe_groups(p),
                                                            p.num_experts, blocks, sm_count);
  const int most_per_sm = way == Way::kFew
                              ? moe_expand_blocks_per_sm(p.num_pairs, moe_groups(p), blocks,
                                                         warp_units, dense, sm_count)
                              : 32;
  shape.grid = dim3(static_cast<unsigned>(blocks),
                    static_cast<unsigned>(
                        moe_grid_tiles(p.num_pairs, moe_groups(p), blocks, sm_count, most_per_sm)));
  shape.threads = kMoeThreads;
  shape.cluster = 1;
  shape.dependent = true;
  shape.shared_percent = config.small ? config.shared_percent : -1;
  return dispatch_half_output(p.dtype, p.y_dtype, [&](auto t, auto y) {
    return launch<typename decltype(t)::type, typename decltype(y)::type>(
        params, vector, way, warp_units, dense, shape, p.stream);
  });
}

}  // namespace lora_ext::cuda
