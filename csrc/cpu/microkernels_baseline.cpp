// The inner loops in 16-byte vectors, which every 64-bit machine has.
#include "cpu/microkernels.h"

#define LORA_EXT_ISA baseline
#define LORA_EXT_VECTOR_BYTES 16
#define LORA_EXT_LOW_32 0, 4, 1, 5
#define LORA_EXT_HIGH_32 2, 6, 3, 7
#define LORA_EXT_LOW_64 0, 2
#define LORA_EXT_HIGH_64 1, 3
#include "cpu/microkernels.inl"

namespace lora_ext::cpu {
constexpr Microkernels kBaselineMicrokernels = baseline::table("baseline");
}
