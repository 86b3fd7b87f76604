// lora_linear of a few dozen tokens on sm_90a: the decode shrink, and beside it a product of W that
// takes the expand along (linear_wgmma.cuh).
#include "kernels/decode_batch.cuh"
#include "kernels/kernels.h"
#include "kernels/launch.cuh"
#include "kernels/linear_shape.cuh"
#include "kernels/linear_wgmma.cuh"
#include "kernels/wide_apply.h"

namespace lora_ext::cuda {
namespace {

// Four stages, so that two CTAs fit an SM with room for a shrink.
using Traits = LinearWgmmaTraits<kLinearWgmmaMaxTokens, 4>;

// B as rows one behind the other, which bulk copies can take.
bool has_bulk_rows(const ApplyParams& p) {
  if (p.b.slot_offsets != nullptr || p.max_rank % 8 != 0) {
    return false;
  }
  for (int i = 0; i < p.slices.count; ++i) {
    if (p.b.row_stride[i] != p.max_rank) {
      return false;
    }
  }
  return is_multiple(p.b, p.slices.count, 8, 16);
}

int cluster_of(const LinearParams& p) {
  LinearShape shape = linear_shape_of(p);
  shape.capable = device_properties().clusters && has_wgmma() && has_tensor_maps();
  shape.vector &= p.apply.x_stride >= p.apply.in_features &&
                  p.weight_stride >= p.apply.in_features && has_bulk_rows(p.apply);
  return linear_wgmma_cluster(shape);
}

template <typename T>
cudaError_t launch_linear(const LinearParams& p, int cluster) {
  const ApplyParams& apply = p.apply;
  LinearWgmmaParams d{};
  d.batch = decode_batch(apply, apply_config_of(apply));
  d.bias = p.bias;
  d.y = apply.y;
  d.y_stride = apply.y_stride;
  d.out_features = static_cast<int32_t>(p.out_features);
  d.pairs = has_pairs(p);
  for (int i = 0; i < apply.slices.count; ++i) {
    d.slices[i] = {apply.b.base[i], apply.b.slot_stride[i], apply.slices.offset[i],
                   apply.slices.offset[i + 1], static_cast<int32_t>(apply.b.first_row[i])};
  }
  LinearMaps maps;
  if (!encode_map(maps.weight, apply.dtype,
                  {p.weight, apply.in_features, p.out_features, p.weight_stride},
                  kLinearTileRows) ||
      !encode_map(maps.x, apply.dtype,
                  {apply.x, apply.in_features, apply.num_tokens, apply.x_stride},
                  Traits::kTokens)) {
    return cudaErrorInvalidValue;
  }
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(ceil_div(p.out_features, kLinearTileRows) * cluster));
  shape.threads = kLinearWgmmaThreads;
  shape.shared_bytes = Traits::shared_bytes(apply.max_rank, cluster);
  shape.cluster = cluster;
  shape.dependent = true;
  return launch_kernel(linear_wgmma_kernel<T, Traits>, shape, p.stream, d, maps, cluster);
}

}  // namespace

bool linear_wgmma_takes(const LinearParams& p) { return cluster_of(p) != 0; }

int linear_wgmma(const LinearParams& p) {
  ApplyParams shrink = p.apply;
  shrink.stream = p.stream;
  const int error = apply_shrink(shrink);
  if (error != 0) {
    return error;
  }
  return dispatch_half(p.apply.dtype, [&](auto t) {
    return launch_linear<typename decltype(t)::type>(p, cluster_of(p));
  });
}

}  // namespace lora_ext::cuda
