// The inner loops in 64-byte vectors with fused multiply-add.
#if defined(__x86_64__) && !defined(__clang__)
#include <immintrin.h>

#include "cpu/microkernels.h"

// Behind the includes: an inline function of a shared header must not be compiled for this
// instruction set, because the linker may keep that copy for every machine.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#define LORA_EXT_ISA avx512
#define LORA_EXT_VECTOR_BYTES 64
#define LORA_EXT_LOW_32 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define LORA_EXT_HIGH_32 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define LORA_EXT_LOW_64 0, 8, 1, 9, 2, 10, 3, 11
#define LORA_EXT_HIGH_64 4, 12, 5, 13, 6, 14, 7, 15
#include "cpu/microkernels.inl"

namespace lora_ext::cpu {
constexpr Microkernels kAvx512Microkernels = avx512::table("avx512");
}
#endif
