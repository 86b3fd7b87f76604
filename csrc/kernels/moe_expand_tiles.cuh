// What the two kernels of moe_expand share: parameters, and how a warp multiplies.
//
// A unit is 64 columns of one slice. The weights are the 16-row operand of the mma, eight pairs its
// columns. Row m of its 16 stands for column 8 g + i of the unit, so that a lane's results of the
// four row blocks are eight neighbours in y, and 16 bytes; a lane holds neighbouring ranks of B, as
// loaded, and the same ranks of xa, split into two 16-bit halves.
#pragma once

#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "kernels/moe_apply.h"

namespace lora_ext::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kUnitColumns = 64;

struct MoeExpandSlice {
  const void* b;
  int64_t slot_stride, expert_stride, row_stride;
  int64_t first_row, column_start;
  int32_t width, units;
};
struct alignas(64) MoeExpandParams {
  MoeRouting routing;
  const int32_t* ranks;
  const float* xa;
  void* y;
  int64_t y_stride, column_stride, xa_row_stride, xa_plane;
  int32_t num_slots, num_experts, num_pairs, max_rank, splits, xa_rank_stride, num_slices;
  bool shares;  // lanes without a pair add up parts of K: see load_shared
  MoeExpandSlice slices[kMaxSlices];
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
__device__ __forceinline__ void load_xa(float (&values)[kChunk], const MoeExpandParams& p,
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

// The same of kRows rows (null: none) and all ranks that are held, so many splits of K at once that
// up to kLoads loads of a lane are on their way together.
template <int kRows, int kChunk, int kHeld, int kLoads = 8>
__device__ __forceinline__ void load_held(float (*values)[kHeld][kChunk], const MoeExpandParams& p,
                                          const float* const* rows, int j, int rank) {
  constexpr int kSpan = 4 * kChunk, kOfSplit = kRows * kHeld * kChunk / 4;
  constexpr int kUnroll = kOfSplit < kLoads ? kLoads / kOfSplit : 1;
#pragma unroll
  for (int n = 0; n < kRows; ++n) {
#pragma unroll
    for (int step = 0; step < kHeld; ++step) {
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        values[n][step][e] = 0.0f;
      }
    }
  }
#pragma unroll kUnroll
  for (int split = 0; split < p.splits; ++split) {
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
#pragma unroll
      for (int step = 0; step < kHeld; ++step) {
#pragma unroll
        for (int quad = 0; quad < kChunk; quad += 4) {
          if (rows[n] != nullptr && step * kSpan + j + quad < rank) {
            const float4 part = *reinterpret_cast<const float4*>(rows[n] + split * p.xa_plane +
                                                                 step * kSpan + j + quad);
            float* sum = values[n][step] + quad;
            sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
          }
        }
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kRows; ++n) {
#pragma unroll
    for (int step = 0; step < kHeld; ++step) {
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        values[n][step][e] = step * kSpan + j + e < rank ? values[n][step][e] : 0.0f;
      }
    }
  }
}

// The same of a tile of up to four pairs, whose lanes would be few: those of eight groups of four
// that have no pair of their own take parts of K for another one. `pairs` is 1, 2 or 4, and `row`
// that of pair g % pairs (null: none).
template <int kChunk, int kHeld>
__device__ __forceinline__ void load_shared(float (&values)[kHeld][kChunk],
                                            const MoeExpandParams& p, const float* row, int j,
                                            int rank, int pairs) {
  constexpr int kSpan = 4 * kChunk;
  const int g = static_cast<int>(threadIdx.x) % 32 / 4, sharers = 8 / pairs;
#pragma unroll
  for (int step = 0; step < kHeld; ++step) {
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      values[step][e] = 0.0f;
    }
  }
#pragma unroll 2
  for (int split = g / pairs; split < p.splits; split += sharers) {
#pragma unroll
    for (int step = 0; step < kHeld; ++step) {
#pragma unroll
      for (int quad = 0; quad < kChunk; quad += 4) {
        if (row != nullptr && step * kSpan + j + quad < rank) {
          const float4 part =
              *reinterpret_cast<const float4*>(row + split * p.xa_plane + step * kSpan + j + quad);
          float* sum = values[step] + quad;
          sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
        }
      }
    }
  }
#pragma unroll
  for (int distance = 4; distance >= 1; distance /= 2) {
    if (distance >= pairs) {
#pragma unroll
      for (int step = 0; step < kHeld; ++step) {
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
          values[step][e] += __shfl_xor_sync(kAllLanes, values[step][e], 4 * distance);
        }
      }
    }
  }
  const int own_rank = g < pairs ? rank : 0;
#pragma unroll
  for (int step = 0; step < kHeld; ++step) {
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      values[step][e] = step * kSpan + j + e < own_rank ? values[step][e] : 0.0f;
    }
  }
}

// Neighbouring values of xa as the sum of two 16-bit ones.
template <typename T, int kChunk>
struct SplitChunk {
  device::Chunk<T, kChunk> high, low;

  __device__ __forceinline__ void set(const float (&values)[kChunk], float scale) {
#pragma unroll
    for (int w = 0; w < kChunk / 2; ++w) {
      device::split_two<T>(values[2 * w] * scale, values[2 * w + 1] * scale, high.words[w],
                           low.words[w]);
    }
  }
};

// acc of kBlocks blocks of 16 columns of y, each of two chunks of weights.
template <typename T, int kChunk, int kBlocks>
__device__ __forceinline__ void multiply(float (*acc)[4],
                                         const device::Chunk<T, kChunk> (&weights)[2 * kBlocks],
                                         const SplitChunk<T, kChunk>& xa) {
#pragma unroll
  for (int w = 0; w < kChunk / 2; w += 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto& x = half == 0 ? xa.high : xa.low;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const auto& a = weights[2 * block];
        const auto& b = weights[2 * block + 1];
        device::mma<T>(acc[block], a.words[w], b.words[w], a.words[w + 1], b.words[w + 1],
                       x.words[w], x.words[w + 1]);
      }
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

// B of a unit in shared memory: 64 columns of kHeld steps of ranks. Of eight ranks a lane, by
// columns, with a gap behind every eight of them, so that the lanes of an access do not meet in a
// bank; else as the lanes read them.
template <int kChunk, int kHeld>
struct UnitWeights {
  static constexpr int kRow = 4 * kHeld * 16, kGap = kChunk == 4 ? 0 : 64;
  static constexpr int kBytes = kChunk == 4 ? 64 * 32 : 8 * (8 * kRow + kGap);

  // Where a lane's ranks of column 8 g + i are.
  __device__ static int at(int i, int step, int g, int q) {
    return kChunk == 4 ? (32 * i + 4 * g + q) * 8
                       : g * (8 * kRow + kGap) + i * kRow + (4 * step + q) * 16;
  }

  // Asks for the unit; the ranks of its column 8 g are at `b`, and `columns` exist from that one
  // on; what lies behind the rank or the last column becomes 0. Of eight ranks a lane the warp asks
  // for neighbouring rows, whole lines at a time where B is in one piece; else each lane for its
  // own.
  template <typename T>
  __device__ __forceinline__ static void copy(unsigned char* to, const T* b, int64_t row_stride,
                                              int rank, int columns, int g, int q) {
    if constexpr (kChunk == 4) {
      const int bytes = 2 * min(max(rank - 4 * q, 0), 4);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        device::copy_async_8<true>(to + at(i, 0, g, q), b + i * row_stride + 4 * q,
                                   i < columns ? bytes : 0);
      }
    } else {
      constexpr int kPieces = kRow / 16, kRows = 32 / kPieces;  // that it asks for at once
      const int lane = 4 * g + q, row = lane / kPieces, piece = lane % kPieces;
      const int bytes = 2 * min(max(rank - 8 * piece, 0), 8);
      b += (row - 8 * g) * row_stride + 8 * piece;
      columns += 8 * g - row;
      to += 16 * lane;
#pragma unroll
      for (int c = 0; c < kUnitColumns; c += kRows) {
        device::copy_async_16(to + c / 8 * (8 * kRow + kGap) + c % 8 * kRow, b,
                              c < columns ? bytes : 0);
        b += kRows * row_stride;
      }
    }
  }

  // Between copies and reads of a warp, where lanes ask for each other's.
  __device__ __forceinline__ static void meet() {
    if constexpr (kChunk != 4) {
      __syncwarp();
    }
  }
};

}  // namespace lora_ext::cuda
