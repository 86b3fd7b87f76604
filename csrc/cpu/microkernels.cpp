#include "cpu/microkernels.h"

#include <cstdlib>
#include <cstring>

namespace lora_ext::cpu {
namespace {

const Microkernels& choose() {
#if defined(__x86_64__) && !defined(__clang__)
  const char* cap = std::getenv("LORA_EXT_CPU_ISA");
  const bool only_avx2 = cap != nullptr && std::strcmp(cap, "avx2") == 0;
  if (cap != nullptr && std::strcmp(cap, "baseline") == 0) return kBaselineMicrokernels;
  __builtin_cpu_init();
  if (!only_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return kAvx512Microkernels;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return kAvx2Microkernels;
  }
#endif
  return kBaselineMicrokernels;
}

}  // namespace

const Microkernels& microkernels() {
  static const Microkernels& chosen = choose();
  return chosen;
}

}  // namespace lora_ext::cpu
