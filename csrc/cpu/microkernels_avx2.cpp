// The inner loops in 32-byte vectors with fused multiply-add.
#if defined(__x86_64__) && !defined(__clang__)
#include <immintrin.h>

#include "cpu/microkernels.h"

// Behind the includes: an inline function of a shared header must not be compiled for this
// instruction set, because the linker may keep that copy for every machine.
#pragma GCC target("avx2,fma,f16c")

#define LORA_EXT_ISA avx2
#define LORA_EXT_VECTOR_BYTES 32
#define LORA_EXT_LOW_32 0, 8, 1, 9, 2, 10, 3, 11
#define LORA_EXT_HIGH_32 4, 12, 5, 13, 6, 14, 7, 15
#define LORA_EXT_LOW_64 0, 4, 1, 5
#define LORA_EXT_HIGH_64 2, 6, 3, 7
#include "cpu/microkernels.inl"

namespace lora_ext::cpu {
constexpr Microkernels kAvx2Microkernels = avx2::table("avx2");
}
#endif
