// Small vectors of 16-bit values: loads that mask what lies outside, and conversions to fp32 and
// back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/params.h"

namespace lora_ext::device {

template <typename T>
__device__ __forceinline__ float to_float(T value) {
  return static_cast<float>(value);
}
template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

__device__ __forceinline__ bool is_aligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// kCount values of 16 bits, `valid` of them read, the others 0. kVector: one load, for an aligned
// address; a chunk is then read whole or masked after the load only where it lies inside the row
// (the caller's promise: valid > 0 means that all kCount values are inside the allocation).
template <typename T, int kCount>
struct Chunk {
  static_assert(sizeof(T) == 2 && (kCount == 4 || kCount == 8));
  uint32_t words[kCount / 2];
};

template <typename T, int kCount>
__device__ __forceinline__ void load_vector(Chunk<T, kCount>& chunk, const T* from, bool inside) {
  if constexpr (kCount == 8) {
    uint4 raw = make_uint4(0, 0, 0, 0);
    if (inside) {
      raw = __ldg(reinterpret_cast<const uint4*>(from));
    }
    chunk.words[0] = raw.x, chunk.words[1] = raw.y, chunk.words[2] = raw.z, chunk.words[3] = raw.w;
  } else {
    uint2 raw = make_uint2(0, 0);
    if (inside) {
      raw = __ldg(reinterpret_cast<const uint2*>(from));
    }
    chunk.words[0] = raw.x, chunk.words[1] = raw.y;
  }
}

// The same of 16 bytes whose line L2 fetches whole where it has to ask memory, which pays where
// other warps are about to read the rest of it.
template <typename T>
__device__ __forceinline__ void load_vector_and_line(Chunk<T, 8>& chunk, const T* from,
                                                     bool inside) {
  uint32_t(&words)[4] = chunk.words;
  words[0] = words[1] = words[2] = words[3] = 0;
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.s32 p, %4, 0;\n"
      "@p ld.global.nc.L2::128B.v4.u32 {%0, %1, %2, %3}, [%5];\n}\n"
      : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])
      : "r"(static_cast<int>(inside)), "l"(from));
}

template <typename T, int kCount>
__device__ __forceinline__ void load_scalars(Chunk<T, kCount>& chunk, const T* from,
                                             int64_t valid) {
  const auto* bits = reinterpret_cast<const uint16_t*>(from);
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const uint32_t low = 2 * i < valid ? __ldg(bits + 2 * i) : 0;
    const uint32_t high = 2 * i + 1 < valid ? __ldg(bits + 2 * i + 1) : 0;
    chunk.words[i] = low | high << 16;
  }
}

// An fp32 value as the sum of two 16-bit ones: 16 significant bits of bf16, 22 of fp16.
template <typename T>
__device__ __forceinline__ void split(float value, T& high, T& low) {
  high = from_float<T>(value);
  const float rest = value - to_float(high);
  low = from_float<T>(isfinite(rest) ? rest : 0.0f);
}

template <typename T>
__device__ __forceinline__ uint32_t pack_two(T low, T high) {
  uint16_t bits[2];
  memcpy(bits, &low, 2);
  memcpy(bits + 1, &high, 2);
  return bits[0] | static_cast<uint32_t>(bits[1]) << 16;
}
template <typename T>
__device__ __forceinline__ uint2 pack_four(const T (&values)[4]) {
  return make_uint2(pack_two(values[0], values[1]), pack_two(values[2], values[3]));
}

// Adds what `mask`, all bits or none, leaves of a value. A condition would make the compiler load
// the value only then, behind all that comes before.
__device__ __forceinline__ void add_masked(float4& sum, const float4& value, int mask) {
  const auto kept = [mask](float part) { return __int_as_float(__float_as_int(part) & mask); };
  sum.x += kept(value.x), sum.y += kept(value.y);
  sum.z += kept(value.z), sum.w += kept(value.w);
}

// fp16 overflows at 65504, which a product with A may well pass: before the split each token's
// values are scaled by a power of two that brings the largest (given as its bits) to [2^13, 2^14),
// and the result is scaled back, both exactly.
template <typename T>
constexpr bool kNeedsScale = false;
template <>
constexpr bool kNeedsScale<__half> = true;

__device__ __forceinline__ int scale_exponent(int max_bits) {
  const int exponent = (max_bits >> 23) - 127 - 13;  // 0, subnormal, Inf and NaN: left as they are
  return max_bits < 0x00800000 || max_bits >= 0x7f800000 ? 0 : max(-126, min(exponent, 126));
}
__device__ __forceinline__ float scale_down(int max_bits) {
  return __int_as_float((127 - scale_exponent(max_bits)) << 23);
}
__device__ __forceinline__ float scale_up(int max_bits) {
  return __int_as_float((127 + scale_exponent(max_bits)) << 23);
}

// Values in and out of 32-bit words without a detour through memory, which a cast of the words'
// address would be.
template <typename T>
__device__ __forceinline__ float unpack(uint32_t word, int half) {
  const auto bits = static_cast<uint16_t>(half == 0 ? word : word >> 16);
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(word);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __half2float(__ushort_as_half(bits));
  } else {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
}
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return __half_as_ushort(pair.x) | static_cast<uint32_t>(__half_as_ushort(pair.y)) << 16;
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return __bfloat16_as_ushort(pair.x) | static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
  }
}

// split() of two values at a time, packed.
template <typename T>
__device__ __forceinline__ void split_two(float first, float second, uint32_t& high,
                                          uint32_t& low) {
  high = pack<T>(first, second);
  const float rest0 = first - unpack<T>(high, 0), rest1 = second - unpack<T>(high, 1);
  low = pack<T>(isfinite(rest0) ? rest0 : 0.0f, isfinite(rest1) ? rest1 : 0.0f);
}

// Eight neighbouring outputs of one token: read, added to in fp32, rounded once.
template <typename Y>
struct Outputs {
  static constexpr int kPerWord = 4 / sizeof(Y);
  static constexpr int kWords = 8 / kPerWord;
  uint32_t words[kWords];

  __device__ __forceinline__ void load(const Y* from) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 raw = *reinterpret_cast<const uint4*>(from + i * kPerWord);
      words[i] = raw.x, words[i + 1] = raw.y, words[i + 2] = raw.z, words[i + 3] = raw.w;
    }
  }
  __device__ __forceinline__ void store(Y* to) const {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      *reinterpret_cast<uint4*>(to + i * kPerWord) =
          make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
  }
  __device__ __forceinline__ void load_scalars(const Y* from, int64_t valid) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (kPerWord == 1) {
        words[i] = i < valid ? reinterpret_cast<const uint32_t*>(from)[i] : 0;
      } else {
        const auto* bits = reinterpret_cast<const uint16_t*>(from);
        const uint32_t low = 2 * i < valid ? bits[2 * i] : 0;
        const uint32_t high = 2 * i + 1 < valid ? bits[2 * i + 1] : 0;
        words[i] = low | high << 16;
      }
    }
  }
  __device__ __forceinline__ void store_scalars(Y* to, int64_t valid) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < valid) {
        if constexpr (kPerWord == 1) {
          reinterpret_cast<uint32_t*>(to)[i] = words[i];
        } else {
          reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
        }
      }
    }
  }
  __device__ __forceinline__ void add(const float (&delta)[8]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (kPerWord == 1) {
        words[i] = __float_as_uint(__uint_as_float(words[i]) + delta[i]);
      } else {
        words[i] = pack<Y>(unpack<Y>(words[i], 0) + delta[2 * i],
                           unpack<Y>(words[i], 1) + delta[2 * i + 1]);
      }
    }
  }
};

}  // namespace lora_ext::device
