// What an adapter adds to 16 rows of W for 8 tokens, by 16 ranks, and how xa lies in shared memory
// for it. Both products of lora_linear are made of these.
#pragma once

#include <type_traits>

#include "common/ptx.cuh"
#include "common/vec.cuh"

namespace lora_ext::cuda {

constexpr int kLinearRanks = 16;  // of a product

// The parts of xa that the shrink has left, added up in their order, of several values at a time.
template <int kValues>
__device__ __forceinline__ void add_up_parts(const float* const (&from)[kValues],
                                             const int (&pieces)[kValues],
                                             const int (&stride)[kValues], float (&sums)[kValues]) {
  constexpr int kParts = 8;  // of each value on their way
  int most = 0;
#pragma unroll
  for (int u = 0; u < kValues; ++u) {
    most = max(most, pieces[u]);
  }
#pragma unroll 1
  for (int c = 0; c < most; c += kParts) {
    float parts[kValues][kParts];
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
#pragma unroll
      for (int u = 0; u < kValues; ++u) {
        parts[u][k] = c + k < pieces[u] ? __ldcg(from[u] + (c + k) * stride[u]) : 0.0f;
      }
    }
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
#pragma unroll
      for (int u = 0; u < kValues; ++u) {
        sums[u] += parts[u][k];
      }
    }
  }
}

// Writes rank `j` of a token's xa. Of every four ranks bf16 has the upper halves, then what they
// lack, in 16 bytes; fp16, whose range is too small for halves, has the values themselves.
template <typename T>
__device__ __forceinline__ void store_rank(float* xa, int j, float value) {
  float* const four = xa + j / 4 * 4;
  if constexpr (std::is_same_v<T, __half>) {
    four[j % 4] = value;
  } else {
    T high, low;
    device::split(value, high, low);
    reinterpret_cast<T*>(four)[j % 4] = high;
    reinterpret_cast<T*>(four)[4 + j % 4] = low;
  }
}

// d[16 rows x 8 tokens] += B xa. A lane has four ranks, of B's rows g and g + 8 as `rows`, two
// ranks a word, of token g's xa as they were stored.
template <typename T>
__device__ __forceinline__ void multiply_ranks(float (&d)[4], const uint32_t (&rows)[2][2],
                                               const uint4& xa) {
  if constexpr (std::is_same_v<T, __half>) {
    const uint32_t ranks[4] = {xa.x, xa.y, xa.z, xa.w};
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      uint32_t a[4], high[2], low[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        a[2 * i] = __float_as_uint(device::unpack<T>(rows[0][s], i));
        a[2 * i + 1] = __float_as_uint(device::unpack<T>(rows[1][s], i));
        high[i] = ranks[2 * s + i] & 0xffffe000u;
        low[i] = __float_as_uint(__uint_as_float(ranks[2 * s + i]) - __uint_as_float(high[i]));
      }
      device::mma_tf32(d, a, high);
      device::mma_tf32(d, a, low);
    }
  } else {
    device::mma<T>(d, rows[0][0], rows[1][0], rows[0][1], rows[1][1], xa.x, xa.y);
    device::mma<T>(d, rows[0][0], rows[1][0], rows[0][1], rows[1][1], xa.z, xa.w);
  }
}

}  // namespace lora_ext::cuda
