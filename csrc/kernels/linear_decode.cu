// lora_linear of few tokens: the decode shrink, and beside it a stream of W that takes the expand
// along.
#include "kernels/decode_batch.cuh"
#include "kernels/kernels.h"
#include "kernels/launch.cuh"
#include "kernels/linear_decode.cuh"
#include "kernels/linear_shape.cuh"

namespace lora_ext::cuda {
namespace {

LinearConfig config_of(const LinearParams& p) {
  const DeviceProperties device = device_properties();
  LinearShape shape = linear_shape_of(p);
  // Both came with sm_90.
  shape.capable = device.clusters && device.shared_bytes >= kLinearSharedBytes;
  // Rows are 32-bit distances in the kernel.
  constexpr int64_t kMostStride = 1 << 27;
  shape.vector &= std::max(p.apply.x_stride, p.weight_stride) < kMostStride;
  return linear_config(shape);
}

// More than half an SM's shared memory, so that two CTAs never share one while others idle.
constexpr int kRingBytes = 110 * 1024, kRingBytesB = 32 * 1024;

template <typename T, int kTiles, int kBlocks, int kLanes>
cudaError_t launch_linear(const LinearParams& p, const LinearConfig& config) {
  using Traits = LinearDecodeTraits<kTiles, kBlocks, kLanes, kRingBytes, kRingBytesB>;
  const ApplyParams& apply = p.apply;
  LinearDecodeParams d{};
  d.x = apply.x;
  d.weight = p.weight;
  d.bias = p.bias;
  d.y = apply.y;
  d.x_stride = apply.x_stride;
  d.weight_stride = p.weight_stride;
  d.y_stride = apply.y_stride;
  d.out_features = static_cast<int32_t>(p.out_features);
  d.pairs = has_pairs(p);
  d.vector_b = apply.b.slot_offsets == nullptr && is_multiple(apply.b, apply.slices.count, 8, 16);
  d.batch = decode_batch(apply, apply_config_of(apply));
  d.b_offsets = apply.b.slot_offsets;
  for (int i = 0; i < apply.slices.count; ++i) {
    d.slices[i] = {apply.b.base[i],
                   apply.b.slot_stride[i],
                   apply.b.row_stride[i],
                   apply.slices.offset[i],
                   apply.slices.offset[i + 1],
                   static_cast<int32_t>(apply.b.first_row[i])};
  }
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(config.groups));
  shape.threads = Traits::kThreads;
  shape.shared_bytes = Traits::shared_bytes(d.batch);
  shape.cluster = 1;
  shape.dependent = true;
  return launch_kernel(linear_decode_kernel<T, Traits>, shape, p.stream, d);
}

template <typename T, int kBlocks>
cudaError_t launch_lanes(const LinearParams& p, const LinearConfig& config) {
  return config.lanes == 2   ? launch_linear<T, 3, kBlocks, 2>(p, config)
         : config.lanes == 4 ? launch_linear<T, 3, kBlocks, 4>(p, config)
                             : launch_linear<T, 3, kBlocks, 8>(p, config);
}

}  // namespace

bool linear_decode_takes(const LinearParams& p) { return config_of(p).blocks != 0; }

int linear_decode(const LinearParams& p) {
  const LinearConfig config = config_of(p);
  ApplyParams shrink = p.apply;
  shrink.stream = p.stream;
  const int error = apply_shrink(shrink);
  if (error != 0) {
    return error;
  }
  return dispatch_half(p.apply.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return config.blocks == 1 ? launch_lanes<T, 1>(p, config) : launch_lanes<T, 2>(p, config);
  });
}

}  // namespace lora_ext::cuda
