// Launching: the device's properties, cluster and dependent-launch attributes, dispatch from dtypes
// to templates.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <utility>

#include "common/params.h"
#include "kernels/beside.h"

namespace lora_ext::cuda {

struct DeviceProperties {
  int sm_count;
  int shared_bytes;  // of an SM, for all CTAs together
  bool clusters;
  bool carveouts;  // a launch may say how much of an SM's L1 cache is shared memory
};

// Read once per device: cudaDeviceGetAttribute costs about as much as an eager call of an op.
inline DeviceProperties device_properties() {
  constexpr int kMaxDevices = 64;
  static std::array<std::atomic<int64_t>, kMaxDevices>
      cache{};  // shared_bytes, then 30 bits of sm_count, carveouts, clusters; 0: not read yet
  int device = 0;
  cudaGetDevice(&device);
  int64_t packed = device < kMaxDevices ? cache[device].load(std::memory_order_relaxed) : 0;
  if (packed == 0) {
    int sm_count = 0, shared_bytes = 0, major = 0, driver = 0;
    cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDriverGetVersion(&driver);
    packed = int64_t{shared_bytes} << 32 | sm_count * 4 | (driver >= 12080 ? 2 : 0) |
             (major >= 9 ? 1 : 0);
    if (device < kMaxDevices) {
      cache[device].store(packed, std::memory_order_relaxed);
    }
  }
  return {static_cast<int>(packed & 0xffffffff) / 4, static_cast<int>(packed >> 32),
          packed % 2 != 0, packed / 2 % 2 != 0};
}

struct LaunchShape {
  dim3 grid;
  int threads, shared_bytes, cluster;  // cluster: CTAs along x
  bool dependent;           // may start while the kernel before it in the stream is at work
  int shared_percent = -1;  // of an SM's L1 cache that is to be shared memory; -1: CUDA decides
};

template <typename... Params, typename... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), const LaunchShape& shape, void* stream,
                          Args&&... args) {
  // The last error is cleared where a call fails: it is reported here, and must not fail the next
  // launch too.
  const auto failed = [](cudaError_t error) {
    return error != cudaSuccess && (cudaGetLastError(), true);
  };
  // 48 KB come without asking, but a kernel's static variables are among them.
  if (shape.shared_bytes > 40 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
    if (failed(error)) {
      return error;
    }
  }
  if (shape.cluster > 8) {  // beyond the size that every chip with clusters guarantees
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (failed(error)) {
      return error;
    }
  }
  cudaLaunchAttribute attributes[3];
  unsigned count = 0;
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = shape.cluster;
    attributes[count].val.clusterDim.y = 1;
    attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  // Both came with sm_90.
  const bool dependent = shape.dependent && device_properties().clusters;
  // A kernel that says nothing of it lets nothing start before its end, but an edge of a graph may.
  const bool early = dependent && start_early(stream);
  if (dependent && !early) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
#if CUDART_VERSION >= 12080
  if (shape.shared_percent >= 0 && device_properties().carveouts) {
    attributes[count].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
    attributes[count].val.sharedMemCarveout = static_cast<unsigned>(shape.shared_percent);
    ++count;
  }
#endif
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
  if (failed(error) && early) {
    start_late(stream);  // what comes next may not wait by itself
  }
  return error;
}

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls body(TypeTag<T>) for a 16-bit dtype.
template <typename Body>
cudaError_t dispatch_half(DType dtype, Body&& body) {
  return dtype == DType::kBFloat16 ? body(TypeTag<__nv_bfloat16>{}) : body(TypeTag<__half>{});
}

// Calls body(TypeTag<T>, TypeTag<Y>): y in the dtype of the weights or in another.
template <typename Body>
cudaError_t dispatch_half_output(DType dtype, DType y_dtype, Body&& body) {
  return dispatch_half(dtype, [&](auto t) {
    if (y_dtype == DType::kFloat32) {
      return body(t, TypeTag<float>{});
    }
    return y_dtype == DType::kBFloat16 ? body(t, TypeTag<__nv_bfloat16>{})
                                       : body(t, TypeTag<__half>{});
  });
}

inline bool is_multiple(const Factor& factor, int num_slices, int64_t elements, int64_t bytes) {
  for (int i = 0; i < num_slices; ++i) {
    if (reinterpret_cast<uintptr_t>(factor.base[i]) % bytes != 0 ||
        factor.row_stride[i] % elements != 0 || factor.slot_stride[i] % elements != 0) {
      return false;
    }
  }
  return true;
}

inline bool is_multiple(const void* pointer, int64_t stride, int64_t elements, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0 && stride % elements == 0;
}

}  // namespace lora_ext::cuda
