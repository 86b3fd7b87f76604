// The PTX that the kernels use, operands named by role.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace lora_ext::device {

// d[16 x 8] += a[16 x 16] * b[16 x 8], fp32 accumulation. With g = lane / 4, q = lane % 4:
//   a: {row g, k 2q..} {row g + 8, k 2q..} {row g, k 2q + 8..} {row g + 8, k 2q + 8..}, two values
//   a register b: {k 2q.., column g} {k 2q + 8.., column g} d: {row g, columns 2q, 2q + 1} {row g +
//   8, columns 2q, 2q + 1}
// k is summed over, so any order of it that a and b share is right: the kernels let lane q hold
// four neighbours in memory where the instruction says 2q, 2q + 1, 2q + 8, 2q + 9, which turns four
// 4-byte loads into one of 8 or 16.
template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&d)[4], uint32_t a0, uint32_t a1,
                                                   uint32_t a2, uint32_t a3, uint32_t b0,
                                                   uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma<__half>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                            uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// d[16 x 8] += a[16 x 8] * b[8 x 8] in tf32, of whose fp32 registers the low 13 bits do not count:
//   a: {row g, k q} {row g + 8, k q} {row g, k q + 4} {row g + 8, k q + 4}
//   b: {k q, column g} {k q + 4, column g}, and d as above
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit values from shared memory; lane i names row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row)));
}

// The same of each matrix transposed.
__device__ __forceinline__ void ldmatrix_transposed_x4(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
// Both ways back.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ void stmatrix_x4(void* row, const uint32_t (&in)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};\n" ::"r"(shared_address(row)),
      "r"(in[0]), "r"(in[1]), "r"(in[2]), "r"(in[3])
      : "memory");
}
__device__ __forceinline__ void stmatrix_transposed_x4(void* row, const uint32_t (&in)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};\n" ::"r"(
                   shared_address(row)),
               "r"(in[0]), "r"(in[1]), "r"(in[2]), "r"(in[3])
               : "memory");
}
#endif

// Of an 8 x 8 matrix of 16-bit values lane i has row i / 4, columns 2 (i % 4) and the next; it gets
// those of the transposed one.
__device__ __forceinline__ uint32_t transpose(uint32_t pair) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(result) : "r"(pair));
  return result;
}

// Copies 16 (8) bytes without a stop in registers; only the first `bytes` are read, the rest
// becomes 0. kLine: where L2 has to ask memory, it asks for all 128 bytes of the line, which pays
// where copies of the rest follow.
template <bool kLine = false>
__device__ __forceinline__ void copy_async_16(void* to, const void* from, int bytes) {
  if constexpr (kLine) {
    asm volatile(
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes)
        : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes)
                 : "memory");
  }
}
// The same to a place in shared memory.
__device__ __forceinline__ void copy_async_16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
// All of them or, where not `exists`, zeros: one instruction where a number of bytes is eight.
__device__ __forceinline__ void copy_async_16_or_zero(uint32_t to, const void* from, bool exists) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.s32 p, %2, 0;\n"
      "cp.async.cg.shared.global [%0], [%1], 16, p;\n}\n" ::"r"(to),
      "l"(from), "r"(static_cast<int>(exists))
      : "memory");
}
template <bool kLine = false>
__device__ __forceinline__ void copy_async_8(void* to, const void* from, int bytes) {
  if constexpr (kLine) {
    asm volatile(
        "cp.async.ca.shared.global.L2::128B [%0], [%1], 8, %2;\n" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes)
        : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes)
                 : "memory");
  }
}
__device__ __forceinline__ void copy_async_4(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Numbered barriers of the CTA for `threads` of its threads, a multiple of 32. Who only arrives
// does not wait.
__device__ __forceinline__ void cta_barrier_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void cta_barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// Barriers in shared memory that count arrivals, and turn over each time all have come.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// Barriers just made become visible to the cluster, at its next barrier.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}
// Arrives, and lets the barrier wait for `bytes` of asynchronous stores too.
__device__ __forceinline__ void barrier_arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier))
               : "memory");
}
// Lets the barrier wait for one arrival more, which comes when all asynchronous copies that this
// thread has asked for are done.
__device__ __forceinline__ void barrier_expect_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.shared::cta.b64 [%0];\n" ::"r"(shared_address(barrier))
               : "memory");
}
// Waits until the barrier has turned over an odd (parity 0) or even (1) number of times.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra again;\n}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Copies the box of a tensor map at the given coordinates, innermost first, to shared memory;
// `barrier` counts its bytes. What lies outside of the tensor becomes zeros.
__device__ __forceinline__ void copy_box(void* to, const void* map, int c0, int c1,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];\n" ::"r"(shared_address(to)),
      "l"(map), "r"(c0), "r"(c1), "r"(shared_address(barrier))
      : "memory");
}
__device__ __forceinline__ void copy_box(void* to, const void* map, int c0, int c1, int c2,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3, %4}], [%5];\n" ::"r"(shared_address(to)),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(shared_address(barrier))
      : "memory");
}
// The same with a policy of what L2 gives up first. These are what createpolicy makes for all bytes
// of a copy; with those that it makes itself, copies took up to 7 % longer.
constexpr uint64_t kEvictNormal = 0x1000000000000000, kEvictFirst = 0x12f0000000000000,
                   kEvictLast = 0x14f0000000000000;
__device__ __forceinline__ void copy_box(void* to, const void* map, int c0, int c1,
                                         uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;\n" ::"r"(shared_address(to)),
      "l"(map), "r"(c0), "r"(c1), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void copy_box(void* to, const void* map, int c0, int c1, int c2,
                                         uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4}], [%5], %6;\n" ::"r"(shared_address(to)),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}
// Copies `bytes`, a multiple of 16, to shared memory; `barrier` counts them.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, int bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];\n" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// Four floats from L2, or zeros. Loads that a condition guards would wait for one another.
__device__ __forceinline__ void load_where(float4& value, const float* from, bool condition) {
  value = make_float4(0, 0, 0, 0);
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.s32 p, %4, 0;\n"
      "@p ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%5];\n}\n"
      : "+f"(value.x), "+f"(value.y), "+f"(value.z), "+f"(value.w)
      : "r"(static_cast<int>(condition)), "l"(from)
      : "memory");
}

// Asks for `bytes` to be brought to L2. A hint: nothing waits for it, and it may come before the
// data are final, since L2 is where all writes meet.
__device__ __forceinline__ void prefetch_l2(const void* from, int bytes) {
#if __CUDA_ARCH__ >= 900
  const auto address = reinterpret_cast<uint64_t>(from), first = address & ~uint64_t{15};
  const auto size = static_cast<uint32_t>(address + bytes - first + 15) & ~15u;
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;\n" ::"l"(first), "r"(size));
#endif
}

__device__ __forceinline__ void prefetch_line(const void* from) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(from));
}

// Brings a kernel's parameters to the constant cache, which each launch finds without them: each
// line costs 0.4 us, so each of the block's warps reads others. Lanes that read different lines
// would wait for one after the other.
template <int kThreads, typename Params>
__device__ __forceinline__ void warm_parameters(const Params& params) {
  constexpr int kLine = 64, kWarps = kThreads / 32;
  constexpr int kLines = (static_cast<int>(sizeof(Params)) + kLine - 1) / kLine;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  int words = 0;
#pragma unroll
  for (int i = 0; i < kLines; i += kWarps) {
    const int at = (warp + i < kLines ? warp + i : 0) * kLine;
    words |= *reinterpret_cast<const int*>(reinterpret_cast<const char*>(&params) + at);
  }
  // What nobody used would not be read.
  asm volatile("{\n.reg .pred p;\nsetp.eq.s32 p, %0, 0;\n@p nanosleep.u32 0;\n}\n" ::"r"(words));
}

// Programmatic dependent launch: what comes before the wait may run while the kernel before is
// still at work.
__device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}
__device__ __forceinline__ void grid_dependency_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Of this CTA's cluster in the grid, along x, and of the CTA in its cluster.
__device__ __forceinline__ int cluster_id() {
  int id;
  asm("mov.u32 %0, %%clusterid.x;\n" : "=r"(id));
  return id;
}
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;\n" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;\n" ::: "memory");
}
// The address of this CTA's `pointer` in the CTA `rank` of the cluster.
__device__ __forceinline__ uint32_t peer_address(const void* pointer, uint32_t rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n"
               : "=r"(address)
               : "r"(shared_address(pointer)), "r"(rank));
  return address;
}
// The same without an order of memory: for a barrier that nothing written passes.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;\n" ::: "memory");
}
// Stores to a peer; its `barrier` counts the bytes as they arrive.
__device__ __forceinline__ void store_peer_async(uint32_t address, const float4& value,
                                                 uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];\n" ::"r"(address),
      "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ float4 load_peer(uint32_t address) {
  float4 value;
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];\n"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address)
               : "memory");
  return value;
}
__device__ __forceinline__ float load_peer_scalar(uint32_t address) {
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];\n" : "=f"(value) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ int load_peer_int(uint32_t address) {
  int value;
  asm volatile("ld.shared::cluster.s32 %0, [%1];\n" : "=r"(value) : "r"(address) : "memory");
  return value;
}
#endif

}  // namespace lora_ext::device
