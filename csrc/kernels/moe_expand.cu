// y += xa B^T for tiles of pairs of one (slot, expert): what moves is B, and y read and written.
//
// A warp serves one tile and 64 columns of one slice and needs no other warp, so there is no
// barrier. The weights are the 16-row operand of the mma, eight pairs at a time its columns. Row m
// of its 16 stands for column 8 g + i of the unit, so that a lane's results of the four row blocks
// are eight neighbours in y, and 16 bytes; a lane holds neighbouring ranks of B, as loaded, and the
// same ranks of xa, split into two 16-bit halves. B up to kHeld steps of ranks comes by
// asynchronous copies to shared memory, where the same lane reads it for every eight pairs: on its
// way it takes no registers, and no cache either, which the shrink beside it leaves little of. The
// next eight rows of y and of xa are on their way meanwhile. B and the first rows of y are asked
// for before the wait for the shrink.
#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "kernels/moe_apply.h"

namespace lora_ext::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kUnitColumns = 64;
constexpr int kRound = 8;  // pairs at a time

struct ExpandSlice {
  const void* b;
  int64_t slot_stride, expert_stride, row_stride;
  int64_t first_row, column_start;
  int32_t width, units;
};
struct alignas(64) ExpandParams {
  MoeRouting routing;
  const int32_t* ranks;
  const float* xa;
  void* y;
  int64_t y_stride, column_stride, xa_row_stride, xa_plane;
  int32_t num_slots, num_experts, num_pairs, max_rank, splits, xa_rank_stride, num_slices;
  ExpandSlice slices[kMaxSlices];
};

// Ranks j and following of one row of B, those from `rank` on 0.
template <typename T, int kChunk, bool kVector>
__device__ __forceinline__ void load_ranks(device::Chunk<T, kChunk>& chunk, const T* row, int j,
                                           int rank, bool exists) {
  const int valid = exists ? min(max(rank - j, 0), kChunk) : 0;
  if (kVector && (valid == kChunk || valid == 0)) {
    device::load_vector(chunk, row + j, valid != 0);
  } else {
    device::load_scalars(chunk, row + j, valid);
  }
}

// Ranks j and following of one row of the intermediate, those from `rank` on 0.
template <int kChunk>
__device__ __forceinline__ void load_xa(float (&values)[kChunk], const ExpandParams& p,
                                        const float* row, int j, int rank) {
#pragma unroll
  for (int quad = 0; quad < kChunk; quad += 4) {
    float4 sum = make_float4(0, 0, 0, 0);
    if (j + quad < rank) {
      const float* from = row + j + quad;
#pragma unroll 4
      for (int split = 0; split < p.splits; ++split, from += p.xa_plane) {
        const float4 part = *reinterpret_cast<const float4*>(from);
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
    }
    const float parts[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      values[quad + e] = j + quad + e < rank ? parts[e] : 0.0f;
    }
  }
}

template <typename T, int kChunk>
__device__ __forceinline__ void multiply(float (&acc)[4][4],
                                         const device::Chunk<T, kChunk> (&weights)[8],
                                         const float (&values)[kChunk], float scale) {
  device::Chunk<T, kChunk> high, low;
#pragma unroll
  for (int w = 0; w < kChunk / 2; ++w) {
    device::split_two<T>(values[2 * w] * scale, values[2 * w + 1] * scale, high.words[w],
                         low.words[w]);
  }
#pragma unroll
  for (int w = 0; w < kChunk / 2; w += 2) {
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      const auto& a = weights[2 * block];
      const auto& b = weights[2 * block + 1];
      device::mma<T>(acc[block], a.words[w], b.words[w], a.words[w + 1], b.words[w + 1],
                     high.words[w], high.words[w + 1]);
    }
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      const auto& a = weights[2 * block];
      const auto& b = weights[2 * block + 1];
      device::mma<T>(acc[block], a.words[w], b.words[w], a.words[w + 1], b.words[w + 1],
                     low.words[w], low.words[w + 1]);
    }
  }
}

// A lane's 2 * kChunk bytes in shared memory, by one access.
template <typename T>
__device__ __forceinline__ void read_chunk(device::Chunk<T, 4>& chunk, const unsigned char* from) {
  const uint2 raw = *reinterpret_cast<const uint2*>(from);
  chunk.words[0] = raw.x, chunk.words[1] = raw.y;
}
template <typename T>
__device__ __forceinline__ void read_chunk(device::Chunk<T, 8>& chunk, const unsigned char* from) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  chunk.words[0] = raw.x, chunk.words[1] = raw.y, chunk.words[2] = raw.z, chunk.words[3] = raw.w;
}
template <typename T>
__device__ __forceinline__ void write_chunk(unsigned char* to, const device::Chunk<T, 4>& chunk) {
  *reinterpret_cast<uint2*>(to) = make_uint2(chunk.words[0], chunk.words[1]);
}
template <typename T>
__device__ __forceinline__ void write_chunk(unsigned char* to, const device::Chunk<T, 8>& chunk) {
  *reinterpret_cast<uint4*>(to) =
      make_uint4(chunk.words[0], chunk.words[1], chunk.words[2], chunk.words[3]);
}

// Of a block: kHeld steps of eight columns for each lane.
template <int kChunk, int kHeld>
constexpr int held_bytes() {
  return kMoeThreads * kHeld * 8 * kChunk * 2;
}

// As many CTAs on an SM as registers hold without spilling.
template <typename T, typename Y, int kChunk, bool kAll>
constexpr int expand_min_blocks() {
  const int fewer = sizeof(Y) == 4 ? kChunk == 4 ? 2 : 1 : device::kNeedsScale<T> ? 1 : 0;
  return !kAll ? 3 - (sizeof(Y) == 4 ? 1 : 0) : (kChunk == 4 ? 6 : 4) - fewer;
}

// kChunk: neighbouring ranks that a lane holds, 4 for pools of rank up to 16, else 8. kAll: no slot
// has more ranks than are held; else the others' weights are read again for every eight pairs.
template <typename T, typename Y, int kChunk, int kHeld, bool kAll, bool kVector>
__global__ void __launch_bounds__(kMoeThreads, (expand_min_blocks<T, Y, kChunk, kAll>()))
    moe_expand_kernel(const __grid_constant__ ExpandParams p) {
  constexpr int kSpan = 4 * kChunk, kSlotBytes = kMoeThreads * kChunk * 2;
  extern __shared__ __align__(1024) unsigned char copies[];
  unsigned char* const own = copies + threadIdx.x * kChunk * 2;  // [step][column][thread]
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  int unit = blockIdx.x * kMoeWarps + threadIdx.x / 32, slice = 0;
  while (slice < p.num_slices && unit >= p.slices[slice].units) {
    unit -= p.slices[slice++].units;
  }
  if (slice == p.num_slices) {
    return;
  }
  device::grid_dependency_launch();
  const ExpandSlice& s = p.slices[slice];
  const int column = unit * kUnitColumns + 8 * g, width = s.width;
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
    const int rank = min(p.ranks[tile.slot], p.max_rank);
    if (rank <= 0) {
      continue;
    }
    const int64_t row_stride = s.row_stride;
    const T* b = static_cast<const T*>(s.b) + tile.slot * s.slot_stride +
                 tile.expert * s.expert_stride + (s.first_row + column) * row_stride;
    const auto load_weights = [&](device::Chunk<T, kChunk>(&to)[8], int j) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        load_ranks<T, kChunk, kVector>(to[i], b + i * row_stride, j + q * kChunk, rank,
                                       column + i < width);
      }
    };
#pragma unroll
    for (int step = 0; step < kHeld; ++step) {
      if constexpr (kVector) {
        const int j = step * kSpan + q * kChunk, valid = min(max(rank - j, 0), kChunk);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          unsigned char* to = own + (8 * step + i) * kSlotBytes;
          const int bytes = column + i < width ? 2 * valid : 0;
          if constexpr (kChunk == 8) {
            device::copy_async_16(to, b + i * row_stride + j, bytes);
          } else {
            device::copy_async_8<true>(to, b + i * row_stride + j, bytes);
          }
        }
      } else {
        device::Chunk<T, kChunk> weights[8];
        load_weights(weights, step * kSpan);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          write_chunk(own + (8 * step + i) * kSlotBytes, weights[i]);
        }
      }
    }
    device::copy_async_commit();
    // The tile's pairs, two to a lane; -1: none.
    int pairs[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = 32 * i + lane;
      pairs[i] = at < tile.count ? permutation[tile.start + at] : -1;
      pairs[i] = pairs[i] < p.num_pairs ? pairs[i] : -1;
    }
    const auto pair_of = [&](int round, int i) {
      return __shfl_sync(kAllLanes, round < 4 ? pairs[0] : pairs[1], (kRound * round + i) % 32);
    };
    // Output o of a lane: pair 2 q + o of the round, eight columns.
    device::Outputs<Y> next[2];
    const auto load_y = [&](int round) {
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        const int pair = pair_of(round, 2 * q + o);
        if (kVector && pair >= 0 && column < width) {
          next[o].load(y + pair * y_stride);
        }
      }
    };
    load_y(0);
    device::grid_dependency_wait();

    device::copy_async_wait<0>();

    const int rounds = (tile.count + kRound - 1) / kRound;
    struct {
      const float* row;
      int rank;
      float values[kHeld][kChunk];
    } next_xa, xa;
    const auto load_next_xa = [&](int round) {
      const int pair = pair_of(round, g);
      next_xa.row = p.xa + max(pair, 0) * p.xa_row_stride + slice * p.xa_rank_stride;
      next_xa.rank = pair >= 0 ? rank : 0;
#pragma unroll
      for (int step = 0; step < kHeld; ++step) {
        load_xa<kChunk>(next_xa.values[step], p, next_xa.row, step * kSpan + q * kChunk,
                        next_xa.rank);
      }
    };
    load_next_xa(0);
    for (int round = 0; round < rounds; ++round) {
      xa = next_xa;
      device::Outputs<Y> outputs[2] = {next[0], next[1]};
      if (round + 1 < rounds) {
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
      float acc[4][4] = {};
#pragma unroll
      for (int step = 0; step < kHeld; ++step) {
        if (step == 0 || step * kSpan < rank) {
          device::Chunk<T, kChunk> weights[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            read_chunk(weights[i], own + (8 * step + i) * kSlotBytes);
          }
          multiply<T, kChunk>(acc, weights, xa.values[step], scale);
        }
      }
      for (int j = kHeld * kSpan; !kAll && j < rank; j += kSpan) {
        device::Chunk<T, kChunk> more[8];
        float part[kChunk];
        load_weights(more, j);
        load_xa<kChunk>(part, p, xa.row, j + q * kChunk, xa.rank);
        multiply<T, kChunk>(acc, more, part, scale);
      }
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        const int to_pair = pair_of(round, 2 * q + o);
        const float scale_up =
            device::kNeedsScale<T>
                ? device::scale_up(__shfl_sync(kAllLanes, max_bits, 4 * (2 * q + o)))
                : 1.0f;
        if (to_pair < 0 || column >= width) {
          continue;
        }
        float delta[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          delta[i] = acc[i / 2][i % 2 * 2 + o] * scale_up;
        }
        Y* to = y + to_pair * y_stride;
        if constexpr (kVector) {
          outputs[o].add(delta);
          outputs[o].store(to);
        } else {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            if (column + i < width) {
              Y* at = to + i * column_stride;
              *at = device::from_float<Y>(device::to_float(*at) + delta[i]);
            }
          }
        }
      }
    }
  }
}

bool is_vector(const MoeApplyParams& p, int chunk) {
  bool vector = p.column_stride == 1 && is_multiple(p.y, p.y_stride, 8, 16) &&
                is_multiple(p.b, p.slices.count, chunk, 2 * chunk);
  for (int i = 0; i < p.slices.count; ++i) {
    vector &= p.column_start[i] % 8 == 0 && (p.slices.offset[i + 1] - p.slices.offset[i]) % 8 == 0;
  }
  return vector;
}

template <typename T, typename Y>
cudaError_t launch(const ExpandParams& params, const MoeApplyParams& p, LaunchShape shape) {
  // The order of the sum over ranks follows from kChunk, so that depends on the ranks alone.
  const bool narrow = p.max_rank <= 16, vector = is_vector(p, narrow ? 4 : 8);
  if (narrow) {
    shape.shared_bytes = held_bytes<4, 1>();
    return launch_kernel(vector ? moe_expand_kernel<T, Y, 4, 1, true, true>
                                : moe_expand_kernel<T, Y, 4, 1, true, false>,
                         shape, p.stream, params);
  }
  if (p.max_rank <= 64) {
    shape.shared_bytes = held_bytes<8, 2>();
    return launch_kernel(vector ? moe_expand_kernel<T, Y, 8, 2, true, true>
                                : moe_expand_kernel<T, Y, 8, 2, true, false>,
                         shape, p.stream, params);
  }
  shape.shared_bytes = held_bytes<8, 1>();
  return launch_kernel(vector ? moe_expand_kernel<T, Y, 8, 1, false, true>
                              : moe_expand_kernel<T, Y, 8, 1, false, false>,
                       shape, p.stream, params);
}

}  // namespace

cudaError_t moe_expand(const MoeApplyParams& p, int splits) {
  const MoeWorkspace at(p, splits);
  ExpandParams params{};
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
  params.splits = splits;
  params.xa_rank_stride = static_cast<int32_t>(at.rank_stride);
  params.num_slices = p.slices.count;
  int units = 0;
  for (int i = 0; i < p.slices.count; ++i) {
    ExpandSlice& slice = params.slices[i];
    slice.b = p.b.base[i];
    slice.slot_stride = p.b.slot_stride[i];
    slice.expert_stride = p.b.expert_stride[i];
    slice.row_stride = p.b.row_stride[i];
    slice.first_row = p.b.first_row[i];
    slice.column_start = p.column_start[i];
    slice.width = p.slices.offset[i + 1] - p.slices.offset[i];
    slice.units = static_cast<int32_t>(ceil_div(slice.width, kUnitColumns));
    units += slice.units;
  }
  LaunchShape shape{};
  const int blocks = static_cast<int>(ceil_div(units, kMoeWarps));
  shape.grid = dim3(static_cast<unsigned>(blocks),
                    static_cast<unsigned>(moe_grid_tiles(p.num_pairs, moe_groups(p), blocks,
                                                         device_properties().sm_count)));
  shape.threads = kMoeThreads;
  shape.cluster = 1;
  shape.dependent = true;
  return dispatch_half_output(p.dtype, p.y_dtype, [&](auto t, auto y) {
    return launch<typename decltype(t)::type, typename decltype(y)::type>(params, p, shape);
  });
}

}  // namespace lora_ext::cuda
