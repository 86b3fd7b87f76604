// Launches the shrink of sm_90a (shrink_wgmma.cuh), with the tensor maps of its copies.
#include <cuda.h>
#include <cudaTypedefs.h>

#include "kernels/heuristics.h"
#include "kernels/launch.cuh"
#include "kernels/shrink_wgmma.cuh"
#include "kernels/wide_apply.h"

namespace lora_ext::cuda {
namespace {

// Whether the machine code that this device runs has wgmma: a build without sm_90a may still run
// on such a chip. Asked once per device.
bool has_wgmma() {
  constexpr int kMaxDevices = 64;
  static std::array<std::atomic<int>, kMaxDevices> cache{};  // 0: not asked yet, 1: no, 2: yes
  int device = 0;
  cudaGetDevice(&device);
  int known = device < kMaxDevices ? cache[device].load(std::memory_order_relaxed) : 0;
  if (known == 0) {
    cudaFuncAttributes attributes{};
    const cudaError_t error =
        cudaFuncGetAttributes(&attributes, shrink_wgmma_kernel<__nv_bfloat16, 32>);
    known = error == cudaSuccess && attributes.maxThreadsPerBlock >= kWarpgroup ? 2 : 1;
    if (device < kMaxDevices) {
      cache[device].store(known, std::memory_order_relaxed);
    }
  }
  return known == 2;
}

// cuTensorMapEncodeTiled of the driver, or null: the library links no driver.
PFN_cuTensorMapEncodeTiled_v12000 encode_tiled() {
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                               12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry)
               : nullptr;
  }();
  return encode;
}

// A map of [planes, rows, columns] values of 16 bits, in boxes of box_rows by 64, swizzled as the
// products want them.
bool encode_map(CUtensorMap& map, DType dtype, int rank, const void* base, int64_t columns,
                int64_t rows, int64_t planes, int64_t row_stride, int64_t plane_stride,
                int box_rows) {
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                               static_cast<cuuint64_t>(planes)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(2 * row_stride),
                                 static_cast<cuuint64_t>(2 * plane_stride)};
  const cuuint32_t box[3] = {kBoxK, static_cast<cuuint32_t>(box_rows), 1}, steps[3] = {1, 1, 1};
  return encode_tiled()(&map,
                        dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                  : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                        rank, const_cast<void*>(base), sizes, strides, box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

bool shrink_maps(ShrinkMaps& maps, const ShrinkParams& p) {
  if (!encode_map(maps.x, p.dtype, 2, p.x, p.in_features, p.num_tokens, 1, p.x_stride, 0,
                  kBoxRowsX)) {
    return false;
  }
  const int64_t slots = p.plan.num_slots;
  for (int i = 0; i < p.num_slices; ++i) {
    const int64_t rows =
        p.a.first_row[i] + int64_t{p.max_rank} * (p.a.rows_by_rank ? p.num_slices : 1);
    const int64_t slot_stride = slots > 1 ? p.a.slot_stride[i] : rows * p.a.row_stride[i];
    if (i > 0 && p.a.base[i] == p.a.base[i - 1] && p.a.first_row[i] == p.a.first_row[i - 1]) {
      maps.a[i] = maps.a[i - 1];
    } else if (!encode_map(maps.a[i], p.dtype, 3, p.a.base[i], p.in_features, rows, slots,
                           p.a.row_stride[i], slot_stride, kBoxRowsA)) {
      return false;
    }
  }
  return true;
}

ShrinkShape shape_of(const ShrinkParams& p) {
  const DeviceProperties device = device_properties();
  return {p.num_tokens,    p.plan.num_slots,
          p.in_features,   p.num_slices * XaLayout::padded(p.max_rank),
          device.sm_count, device.clusters};
}

template <typename T, int kRows>
cudaError_t launch_wgmma(const ShrinkParams& p, const ShrinkShape& shape, int cluster) {
  ShrinkMaps maps;
  if (!shrink_maps(maps, p)) {
    return cudaErrorInvalidValue;
  }
  const int64_t clusters = p.layout.parts > 0
                               ? p.layout.whole_tiles
                               : shrink_clusters(p.num_tokens, p.plan.num_slots, shape.sm_count);
  LaunchShape launch{};
  launch.grid = dim3(static_cast<unsigned>(clusters * cluster),
                     static_cast<unsigned>(ceil_div(shape.rows, kRows)));
  launch.threads = kWgmmaThreads;
  launch.shared_bytes = WgmmaTraits<kRows>::kSharedBytes;
  launch.cluster = cluster;
  launch.dependent = !p.fill;
  const auto inverse =
      static_cast<unsigned>((1ull << 32) / cluster + ((1ull << 32) % cluster != 0));
  return launch_kernel(shrink_wgmma_kernel<T, kRows>, launch, p.stream, p, maps, cluster,
                       static_cast<int>(clusters), inverse);
}

}  // namespace

bool shrink_takes_wgmma(const ShrinkParams& p) {
  if (p.num_tokens <= kDecodeMaxTokens || p.dtype == DType::kFloat32 || !shrink_is_vector(p) ||
      p.x_stride < p.in_features || !has_wgmma() || encode_tiled() == nullptr) {
    return false;
  }
  for (int i = 0; i < p.num_slices; ++i) {
    if (p.a.row_stride[i] < p.in_features ||
        (p.plan.num_slots > 1 && p.a.slot_stride[i] < p.a.row_stride[i])) {
      return false;
    }
  }
  return true;
}

int shrink_wgmma(const ShrinkParams& p) {
  const ShrinkShape shape = shape_of(p);
  const ShrinkConfig config = shrink_wgmma_config(shape);
  return dispatch_half(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    switch (config.rows) {
      case 16:
        return launch_wgmma<T, 16>(p, shape, config.cluster);
      case 32:
        return launch_wgmma<T, 32>(p, shape, config.cluster);
      case 48:
        return launch_wgmma<T, 48>(p, shape, config.cluster);
      case 64:
        return launch_wgmma<T, 64>(p, shape, config.cluster);
      case 128:
        return launch_wgmma<T, 128>(p, shape, config.cluster);
      default:
        return launch_wgmma<T, 192>(p, shape, config.cluster);
    }
  });
}

XaLayout shrink_layout(const ShrinkParams& p) {
  return shrink_takes_wgmma(p) ? xa_layout(shape_of(p)) : XaLayout{};
}

int64_t shrink_layout_elements(const ShrinkParams& p) {
  if (p.dtype == DType::kFloat32 || !has_wgmma()) {
    return 0;
  }
  const ShrinkShape shape = shape_of(p);
  return xa_elements(shape, xa_layout(shape));
}

}  // namespace lora_ext::cuda
