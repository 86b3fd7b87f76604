// Launches the shrink of sm_90a (shrink_wgmma.cuh), with the tensor maps of its copies.
#include <cuda.h>

#include <numeric>
#include <type_traits>

#include "kernels/launch.cuh"
#include "kernels/prefill_heuristics.h"
#include "kernels/shrink_sum.cuh"
#include "kernels/shrink_wgmma.cuh"
#include "kernels/tensor_map.h"
#include "kernels/wide_apply.h"

namespace lora_ext::cuda {
namespace {

bool shrink_maps(ShrinkMaps& maps, const ShrinkParams& p, int large_rows) {
  for (int i = 0; i < kBoxesOfX; ++i) {
    if (!encode_map(maps.x[i], p.dtype, {p.x, p.in_features, p.num_tokens, p.x_stride},
                    kBoxRowsX >> i)) {
      return false;
    }
  }
  const int64_t slots = p.plan.num_slots;
  for (int i = 0; i < p.num_slices; ++i) {
    const int64_t slot_rows =
        p.a.first_row[i] + int64_t{p.max_rank} * (p.a.rows_by_rank ? p.num_slices : 1);
    const int64_t slot_stride = slots > 1 ? p.a.slot_stride[i] : slot_rows * p.a.row_stride[i];
    if (i > 0 && p.a.base[i] == p.a.base[i - 1] && p.a.first_row[i] == p.a.first_row[i - 1]) {
      maps.a[i] = maps.a[i - 1], maps.large_a[i] = maps.large_a[i - 1];
      continue;
    }
    const auto encode = [&](CUtensorMap& map, int box_rows) {
      return encode_map(
          map, p.dtype,
          {p.a.base[i], p.in_features, slot_rows, p.a.row_stride[i], slots, slot_stride}, box_rows);
    };
    if (!encode(maps.a[i], kBoxRowsA) || !encode(maps.large_a[i], large_rows)) {
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

template <typename T, int kRows, int kKilobytes, ShrinkWay kWay>
cudaError_t launch_wgmma(const ShrinkParams& p, const ShrinkShape& shape, int cluster) {
  ShrinkWork work{};
  work.p = p;
  const int slice_rows = XaLayout::padded(p.max_rank);
  work.large_rows = p.num_slices * slice_rows <= kRows ? slice_rows : std::gcd(slice_rows, kRows);
  ShrinkMaps maps;
  if (!shrink_maps(maps, p, work.large_rows)) {
    return cudaErrorInvalidValue;
  }
  const int64_t clusters = p.layout.parts > 0
                               ? p.layout.parts
                               : shrink_clusters(p.num_tokens, p.plan.num_slots, shape.sm_count);
  LaunchShape launch{};
  launch.grid = dim3(static_cast<unsigned>(clusters * cluster),
                     static_cast<unsigned>(ceil_div(shape.rows, kRows)));
  launch.threads = kWgmmaThreads;
  launch.shared_bytes = WgmmaTraits<kRows, kKilobytes>::kSharedBytes;
  launch.cluster = cluster;
  launch.dependent = !p.fill;
  work.cluster = cluster;
  work.places = static_cast<int>(
      resident_blocks(shape.sm_count, WgmmaTraits<kRows, kKilobytes>::kBlocks, cluster));
  work.num_clusters = static_cast<int>(clusters);
  return launch_kernel(shrink_wgmma_kernel<T, kRows, kKilobytes, kWay>, launch, p.stream, work,
                       maps);
}

cudaError_t launch_sum(const ShrinkParams& p, int sm_count) {
  const int64_t quads = int64_t{p.layout.most_tiles} * kWideTileTokens * p.xa_stride / 4;
  LaunchShape launch{};
  launch.grid = dim3(static_cast<unsigned>(
      std::min<int64_t>(ceil_div(4 * quads, kSumThreads), int64_t{kSumBlocks} * sm_count)));
  launch.threads = kSumThreads;
  launch.cluster = 1;
  launch.dependent = true;
  return launch_kernel(shrink_sum_kernel, launch, p.stream, p);
}

}  // namespace

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
    const cudaError_t error = cudaFuncGetAttributes(
        &attributes, shrink_wgmma_kernel<__nv_bfloat16, 32, kShrinkHalf, ShrinkWay::kAny>);
    known = error == cudaSuccess && attributes.maxThreadsPerBlock >= kWarpgroup ? 2 : 1;
    if (device < kMaxDevices) {
      cache[device].store(known, std::memory_order_relaxed);
    }
  }
  return known == 2;
}

bool shrink_takes_wgmma(const ShrinkParams& p) {
  if (p.num_tokens <= kDecodeMaxTokens || p.dtype == DType::kFloat32 || !shrink_is_vector(p) ||
      p.x_stride < p.in_features || !has_wgmma() || !has_tensor_maps()) {
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
  const ShrinkConfig config = p.layout.parts > 0
                                  ? ShrinkConfig{shrink_rows(shape.rows), 1, kShrinkWhole}
                                  : shrink_wgmma_config(shape);
  const cudaError_t error = dispatch_half(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const auto launch = [&](auto rows) {
      constexpr int kRows = decltype(rows)::value;
      constexpr int kSmaller = kRows <= 96 ? kShrinkHalf : kShrinkPart;
      if (p.layout.parts > 0) {
        return launch_wgmma<T, kRows, kShrinkWhole, ShrinkWay::kParts>(p, shape, 1);
      }
      if (config.kilobytes == kShrinkWhole) {
        return launch_wgmma<T, kRows, kShrinkWhole, ShrinkWay::kAny>(p, shape, config.cluster);
      }
      return p.layout.by_tile && config.cluster > 1
                 ? launch_wgmma<T, kRows, kSmaller, ShrinkWay::kClusters>(p, shape, config.cluster)
                 : launch_wgmma<T, kRows, kSmaller, ShrinkWay::kAny>(p, shape, config.cluster);
    };
    switch (config.rows) {
      case 16:
        return launch(std::integral_constant<int, 16>{});
      case 32:
        return launch(std::integral_constant<int, 32>{});
      case 48:
        return launch(std::integral_constant<int, 48>{});
      case 64:
        return launch(std::integral_constant<int, 64>{});
      case 96:
        return launch(std::integral_constant<int, 96>{});
      case 128:
        return launch(std::integral_constant<int, 128>{});
      default:
        return launch(std::integral_constant<int, 192>{});
    }
  });
  return error == cudaSuccess && p.layout.summed ? launch_sum(p, shape.sm_count) : error;
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
