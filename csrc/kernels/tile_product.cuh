// A block of 64 x 64 elements of a matrix product, summed in fp32 by 128 threads: the engine of the
// gradients' kernels.
//
// Operands of any dtype become fp32 in shared memory, where each keeps the orientation that it has
// in global memory. Products are tf32: bf16 and fp16 are exact in it, and an fp32 operand goes as
// the sum of two tf32 values, so that one path serves all mixtures of dtypes, and fp16's range does
// not matter. Where the weights are fp32, all arithmetic is. The next step's values wait in
// registers while a step is computed.
#pragma once

#include "common/ptx.cuh"
#include "common/vec.cuh"

namespace lora_ext::cuda {

constexpr int kProductThreads = 128;
constexpr int kProductRows = 64, kProductColumns = 64;  // of the result; 16 rows a warp
constexpr int kProductStep = 32;                        // terms of the sum at a time

// The matrix behind one side of a product. Elements outside of rows x columns are 0.
struct Operand {
  const void* base;       // the first element of row 0 that belongs to it
  int64_t stride;         // elements between rows
  const int32_t* tokens;  // the token whose row it is, or null: row i is row i
  int32_t rows, columns;
  int64_t num_tokens;  // tokens from here on have no row
  DType dtype;
};

// Four neighbouring elements, as they lie in memory.
struct RawQuad {
  uint32_t words[4];

  __device__ __forceinline__ void load(const Operand& from, int64_t at, int valid) {
    words[0] = words[1] = words[2] = words[3] = 0;
    if (valid <= 0) {
      return;
    }
    if (from.dtype == DType::kFloat32) {
      const auto* values = static_cast<const uint32_t*>(from.base) + at;
      if (valid >= 4 && device::is_aligned(values, 16)) {
        const uint4 quad = __ldg(reinterpret_cast<const uint4*>(values));
        words[0] = quad.x, words[1] = quad.y, words[2] = quad.z, words[3] = quad.w;
        return;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        words[e] = e < valid ? __ldg(values + e) : 0;
      }
      return;
    }
    const auto* values = static_cast<const uint16_t*>(from.base) + at;
    if (valid >= 4 && device::is_aligned(values, 8)) {
      const uint2 pair = __ldg(reinterpret_cast<const uint2*>(values));
      words[0] = pair.x, words[1] = pair.y;
      return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      words[e / 2] |= e < valid ? static_cast<uint32_t>(__ldg(values + e)) << (e % 2 * 16) : 0;
    }
  }

  __device__ __forceinline__ float4 widen(DType dtype) const {
    if (dtype == DType::kFloat32) {
      return make_float4(__uint_as_float(words[0]), __uint_as_float(words[1]),
                         __uint_as_float(words[2]), __uint_as_float(words[3]));
    }
    if (dtype == DType::kBFloat16) {
      using T = __nv_bfloat16;
      return make_float4(device::unpack<T>(words[0], 0), device::unpack<T>(words[0], 1),
                         device::unpack<T>(words[1], 0), device::unpack<T>(words[1], 1));
    }
    using T = __half;
    return make_float4(device::unpack<T>(words[0], 0), device::unpack<T>(words[0], 1),
                       device::unpack<T>(words[1], 0), device::unpack<T>(words[1], 1));
  }
};

// A thread's share of an operand on its way to shared memory: 64 rows of which a step takes 32
// columns (kAcross), or 64 columns of which it takes 32 rows. The strides keep the eight rows or
// four columns of an mma's fragment in distinct banks.
template <bool kAcross>
struct Stream {
  static constexpr int kQuads = (kAcross ? kProductStep : kProductColumns) / 4;  // of a row
  static constexpr int kRowsPerRound = kProductThreads / kQuads;
  static constexpr int kRounds = 4;
  static constexpr int kStride = kAcross ? kProductStep + 4 : kProductColumns + 8;
  static constexpr int kFloats = kRowsPerRound * kRounds * kStride;

  int64_t token[kRounds];  // or -1: this thread's rows of the step that is loaded next
  RawQuad raw[kRounds];

  __device__ __forceinline__ static int row() { return threadIdx.x / kQuads; }
  __device__ __forceinline__ static int column() { return threadIdx.x % kQuads * 4; }

  __device__ __forceinline__ void locate(const Operand& from, int k) {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int at = row() + kRowsPerRound * i + (kAcross ? 0 : k);
      token[i] = at < from.rows ? at : -1;
      if (from.tokens != nullptr && token[i] >= 0) {
        const int id = from.tokens[at];
        token[i] = id < from.num_tokens ? id : -1;
      }
    }
  }
  __device__ __forceinline__ void load(const Operand& from, int k) {
    const int first = column() + (kAcross ? k : 0);
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      raw[i].load(from, token[i] * from.stride + first, token[i] < 0 ? 0 : from.columns - first);
    }
  }
  __device__ __forceinline__ void store(float* to, DType dtype) const {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      *reinterpret_cast<float4*>(to + (row() + kRowsPerRound * i) * kStride + column()) =
          raw[i].widen(dtype);
    }
  }
  // Element (m, k) of the left operand in shared memory, (n, k) of the right one.
  __device__ __forceinline__ static int at(int m, int k) {
    return kAcross ? m * kStride + k : k * kStride + m;
  }
};

// sum[m][n] of the terms left(m, k) * right(k, n). kAcross: a row of `left` is a row of the result,
// and the sum runs along it; else a row of `left` is a term. A row of `right` is always a term.
template <bool kAcross, bool kExact>
struct TileProduct {
  using Left = Stream<kAcross>;
  using Right = Stream<false>;
  static constexpr int kStageFloats = Left::kFloats + Right::kFloats;
  static constexpr int kSumStride = kProductColumns + 1;
  static constexpr int kSharedFloats = 2 * kStageFloats;
  static_assert(kProductRows * kSumStride <= kSharedFloats);

  float* shared;
  int stage = 0;
  float acc[kProductColumns / 8][4] = {};

  __device__ explicit TileProduct(float* shared_) : shared(shared_) {}

  // Adds the terms [begin, end); both are multiples of a step, or the last.
  __device__ __forceinline__ void add(const Operand& left, const Operand& right, int begin,
                                      int end) {
    if (begin >= end) {
      return;
    }
    Left lefts;
    Right rights;
    lefts.locate(left, begin), rights.locate(right, begin);
    lefts.load(left, begin), rights.load(right, begin);
    for (int k = begin; k < end; k += kProductStep) {
      float* to = shared + stage * kStageFloats;
      const int next = k + kProductStep;
      if (next < end) {
        if constexpr (!kAcross) {
          lefts.locate(left, next);
        }
        rights.locate(right, next);
      }
      lefts.store(to, left.dtype), rights.store(to + Left::kFloats, right.dtype);
      __syncthreads();  // also: no warp is still at the stage that is filled next
      if (next < end) {
        lefts.load(left, next), rights.load(right, next);
      }
      multiply(to, to + Left::kFloats, min(kProductStep, end - k), right.columns,
               left.dtype == DType::kFloat32, right.dtype == DType::kFloat32);
      stage ^= 1;
    }
  }

  // Calls store(m, n, sum) for all m < rows and n < columns, neighbouring threads with neighbouring
  // n, or m where kAcross is false and the result is stored `transposed`. The first `members` CTAs
  // of the cluster hold a part of the sums each: they share the elements, and add the parts in
  // order.
  template <typename Store>
  __device__ __forceinline__ void finish(int members, int member, int rows, int columns,
                                         bool transposed, Store&& store) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    __syncthreads();
#pragma unroll
    for (int block = 0; block < kProductColumns / 8; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        shared[(warp * 16 + g + i / 2 * 8) * kSumStride + block * 8 + 2 * q + i % 2] =
            acc[block][i];
      }
    }
    join(members);
    constexpr int kElements = kProductRows * kProductColumns;
    for (int i = kElements / members * member + threadIdx.x; i < kElements / members * (member + 1);
         i += kProductThreads) {
      const int m = transposed ? i % kProductRows : i / kProductColumns;
      const int n = transposed ? i / kProductRows : i % kProductColumns;
      if (m < rows && n < columns) {
        store(m, n, sum_of(shared + m * kSumStride + n, members));
      }
    }
    if (members > 1) {
      join(members);  // peers may still be reading this CTA's sums
    }
  }

 private:
  // Waits for the CTAs that have a part; the others of the cluster have left.
  __device__ __forceinline__ static void join(int members) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (members > 1) {
      device::cluster_arrive();
      device::cluster_wait();
      return;
    }
#endif
    __syncthreads();
  }

  __device__ __forceinline__ static float sum_of(const float* part, int members) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (members > 1) {
      float sum = 0.0f;
      for (int peer = 0; peer < members; ++peer) {
        sum += device::load_peer_scalar(device::peer_address(part, peer));
      }
      return sum;
    }
#endif
    return *part;
  }

  // fp32 as the sum of two tf32 values, 21 bits in all.
  __device__ __forceinline__ static void split(float value, uint32_t& high, uint32_t& low) {
    high = __float_as_uint(value) & 0xffffe000u;
    low = isfinite(value) ? __float_as_uint(value - __uint_as_float(high)) : 0;
    if (!isfinite(value)) {
      high = __float_as_uint(value);
    }
  }

  __device__ __forceinline__ void multiply(const float* left, const float* right, int depth,
                                           int columns, bool split_left, bool split_right) {
    const int lane = threadIdx.x % 32, m = threadIdx.x / 32 * 16 + lane / 4;
    const int g = lane / 4, q = lane % 4;
    if constexpr (kExact) {
#pragma unroll 4
      for (int k = 0; k < depth; ++k) {
        const float upper = left[Left::at(m, k)], lower = left[Left::at(m + 8, k)];
#pragma unroll
        for (int block = 0; block < kProductColumns / 8; ++block) {
          if (block * 8 < columns) {
            const float2 pair =
                *reinterpret_cast<const float2*>(right + Right::at(block * 8 + 2 * q, k));
            acc[block][0] = fmaf(upper, pair.x, acc[block][0]);
            acc[block][1] = fmaf(upper, pair.y, acc[block][1]);
            acc[block][2] = fmaf(lower, pair.x, acc[block][2]);
            acc[block][3] = fmaf(lower, pair.y, acc[block][3]);
          }
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < kProductStep; k += 8) {
        if (k >= depth) {
          break;
        }
        uint32_t a_high[4], a_low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          split(left[Left::at(m + i % 2 * 8, k + q + i / 2 * 4)], a_high[i], a_low[i]);
        }
#pragma unroll
        for (int block = 0; block < kProductColumns / 8; ++block) {
          if (block * 8 < columns) {
            uint32_t b_high[2], b_low[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              split(right[Right::at(block * 8 + g, k + q + i * 4)], b_high[i], b_low[i]);
            }
            if (split_left) {
              device::mma_tf32(acc[block], a_low, b_high);
            }
            if (split_right) {
              device::mma_tf32(acc[block], a_high, b_low);
            }
            device::mma_tf32(acc[block], a_high, b_high);
          }
        }
      }
    }
  }
};

}  // namespace lora_ext::cuda
