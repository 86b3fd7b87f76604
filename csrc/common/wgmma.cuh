// Hopper's matrix products of a warpgroup (four warps), from shared memory: sm_90a only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/ptx.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace lora_ext::device {

// Rows of kRowBytes, 128 or 64, contraction along the row, in the swizzle of as many bytes: row r
// is at byte kRowBytes r, its 16-byte chunk c at position c ^ swizzle_of(r). The start must be a
// multiple of 8 rows' bytes, plus 32 for each step of 16 values.
template <int kRowBytes = 128>
__device__ __forceinline__ uint64_t swizzled_tile(const void* start) {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  constexpr uint64_t kEightRows = 8 * kRowBytes / 16, kSwizzle = 128 / kRowBytes;
  return (shared_address(start) & 0x3ffff) >> 4 | uint64_t{1} << 16 | kEightRows << 32 |
         kSwizzle << 62;
}
template <int kRowBytes>
__device__ __forceinline__ int swizzle_of(int row) {
  return kRowBytes == 128 ? row % 8 : row / 2 % 4;
}

// What threads wrote to shared memory becomes visible to the products; before a barrier.
__device__ __forceinline__ void fence_shared_for_products() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// From here on the warpgroup's threads have that many registers, a multiple of 8; what some give
// others may take.
template <int kRegisters>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// d[64 x N] += a[64 x 16] b[N x 16]^T, asynchronously. With g = lane / 4, q = lane % 4, warp w of
// the four: d[4 n + 2 h + e] is row 16 w + 8 h + g, column 8 n + 2 q + e. d is overwritten where
// `first`.
template <typename T, int kColumns>
__device__ __forceinline__ void wgmma(float (&d)[kColumns / 2], uint64_t a, uint64_t b,
                                      bool first = false);

#define LORA_EXT_REGISTERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LORA_EXT_REGISTERS_16        \
  "%0, %1, %2, %3, %4, %5, %6, %7, " \
  "%8, %9, %10, %11, %12, %13, %14, %15"
#define LORA_EXT_REGISTERS_24 \
  LORA_EXT_REGISTERS_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23"
#define LORA_EXT_REGISTERS_32                  \
  LORA_EXT_REGISTERS_16                        \
  ", %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define LORA_EXT_REGISTERS_48                  \
  LORA_EXT_REGISTERS_32                        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47"
#define LORA_EXT_REGISTERS_64                  \
  LORA_EXT_REGISTERS_48                        \
  ", %48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define LORA_EXT_REGISTERS_80                  \
  LORA_EXT_REGISTERS_64                        \
  ", %64, %65, %66, %67, %68, %69, %70, %71, " \
  "%72, %73, %74, %75, %76, %77, %78, %79"
#define LORA_EXT_REGISTERS_96                  \
  LORA_EXT_REGISTERS_80                        \
  ", %80, %81, %82, %83, %84, %85, %86, %87, " \
  "%88, %89, %90, %91, %92, %93, %94, %95"
#define LORA_EXT_SUMS_8(i)                                                                    \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define LORA_EXT_SUMS_16(i) LORA_EXT_SUMS_8(i), LORA_EXT_SUMS_8(i + 8)
#define LORA_EXT_SUMS_24(i) LORA_EXT_SUMS_16(i), LORA_EXT_SUMS_8(i + 16)
#define LORA_EXT_SUMS_32(i) LORA_EXT_SUMS_16(i), LORA_EXT_SUMS_16(i + 16)
#define LORA_EXT_SUMS_48(i) LORA_EXT_SUMS_32(i), LORA_EXT_SUMS_16(i + 32)
#define LORA_EXT_SUMS_64(i) LORA_EXT_SUMS_32(i), LORA_EXT_SUMS_32(i + 32)
#define LORA_EXT_SUMS_96(i) LORA_EXT_SUMS_64(i), LORA_EXT_SUMS_32(i + 64)
#define LORA_EXT_WGMMA(T, type, columns, registers, a_operand, b_operand, first)                  \
  template <>                                                                                     \
  __device__ __forceinline__ void wgmma<T, columns>(float(&d)[registers], uint64_t a, uint64_t b, \
                                                    bool first_) {                                \
    asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, " first                                        \
                 ", 0;\n"                                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type            \
                 " {" LORA_EXT_REGISTERS_##registers "}, " a_operand ", " b_operand               \
                                                     ", p, 1, 1, 0, 0;\n}\n"                      \
                 : LORA_EXT_SUMS_##registers(0)                                                   \
                 : "l"(a), "l"(b), "r"(static_cast<int>(first_)));                                \
  }
LORA_EXT_WGMMA(__nv_bfloat16, "bf16", 16, 8, "%8", "%9", "%10")
LORA_EXT_WGMMA(__half, "f16", 16, 8, "%8", "%9", "%10")
LORA_EXT_WGMMA(__nv_bfloat16, "bf16", 48, 24, "%24", "%25", "%26")
LORA_EXT_WGMMA(__half, "f16", 48, 24, "%24", "%25", "%26")
LORA_EXT_WGMMA(__nv_bfloat16, "bf16", 32, 16, "%16", "%17", "%18")
LORA_EXT_WGMMA(__half, "f16", 32, 16, "%16", "%17", "%18")
LORA_EXT_WGMMA(__nv_bfloat16, "bf16", 64, 32, "%32", "%33", "%34")
LORA_EXT_WGMMA(__half, "f16", 64, 32, "%32", "%33", "%34")
LORA_EXT_WGMMA(__nv_bfloat16, "bf16", 96, 48, "%48", "%49", "%50")
LORA_EXT_WGMMA(__half, "f16", 96, 48, "%48", "%49", "%50")
LORA_EXT_WGMMA(__nv_bfloat16, "bf16", 128, 64, "%64", "%65", "%66")
LORA_EXT_WGMMA(__half, "f16", 128, 64, "%64", "%65", "%66")
LORA_EXT_WGMMA(__nv_bfloat16, "bf16", 192, 96, "%96", "%97", "%98")
LORA_EXT_WGMMA(__half, "f16", 192, 96, "%96", "%97", "%98")
#undef LORA_EXT_WGMMA

// The same with a in registers, of which lanes hold a[16 w + g + 8 (i % 2)][8 (i / 2) + 2 q ..] in
// register i, as for mma. d is overwritten where `first`.
template <typename T, int kColumns>
__device__ __forceinline__ void wgmma(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b,
                                      bool first);

#define LORA_EXT_WGMMA(T, type, columns, registers, a_operand, b_operand, first)                 \
  template <>                                                                                    \
  __device__ __forceinline__ void wgmma<T, columns>(float(&d)[registers], const uint32_t(&a)[4], \
                                                    uint64_t b, bool first_) {                   \
    asm volatile(                                                                                \
        "{\n.reg .pred p;\nsetp.eq.b32 p, " first                                                \
        ", 0;\n"                                                                                 \
        "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type                    \
        " {" LORA_EXT_REGISTERS_##registers "}, " a_operand ", " b_operand ", p, 1, 1, 0;\n}\n"  \
        : LORA_EXT_SUMS_##registers(0)                                                           \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(first_)));    \
  }
LORA_EXT_WGMMA(__nv_bfloat16, "bf16", 64, 32, "{%32, %33, %34, %35}", "%36", "%37")
LORA_EXT_WGMMA(__half, "f16", 64, 32, "{%32, %33, %34, %35}", "%36", "%37")
#undef LORA_EXT_WGMMA

}  // namespace lora_ext::device

#endif
