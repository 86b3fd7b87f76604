// lora_linear of 128 or 256 tokens on sm_90a where W is one wave of the chip: the decode shrink,
// its sums as columns of x, and beside both a product of W that has the adapters as more steps of K
// (linear_wave.cuh).
#include "kernels/decode_batch.cuh"
#include "kernels/kernels.h"
#include "kernels/launch.cuh"
#include "kernels/linear_shape.cuh"
#include "kernels/linear_wave.cuh"
#include "kernels/linear_wave_xa.cuh"
#include "kernels/wide_apply.h"

namespace lora_ext::cuda {
namespace {

template <int kTokens>
using Traits = LinearWaveTraits<kTokens, kTokens <= 128 ? 4 : 3>;

// Calls body(integral constant) with the tokens that the product's instance is for.
template <typename Body>
auto dispatch_tokens(int tokens, Body&& body) {
  return tokens <= 128 ? body(std::integral_constant<int, 128>{})
                       : body(std::integral_constant<int, 256>{});
}

int tokens_of(const LinearParams& p) {
  LinearShape shape = linear_shape_of(p);
  shape.capable = device_properties().clusters && has_wgmma() && has_tensor_maps();
  shape.vector &= p.apply.x_stride >= p.apply.in_features &&
                  p.weight_stride >= p.apply.in_features && has_bulk_rows(p.apply);
  return linear_wave_tokens(shape);
}

// Behind the shrink's partial products.
struct Workspace {
  int64_t xa, entries, size;  // in fp32 elements

  Workspace(const LinearParams& p, int tokens) {
    const auto align = [](int64_t elements) { return ceil_div(elements, 32) * 32; };
    const int64_t bytes = dispatch_tokens(
        tokens, [&](auto t) { return WaveXa<decltype(t)::value>::box(p.apply.slices.count, 0); });
    xa = align(apply_workspace(p.apply));
    entries = align(xa + bytes / 4);
    size = entries + static_cast<int64_t>(sizeof(WaveEntries)) / 4;
  }
};

template <int kTokens>
cudaError_t launch_xa(const LinearParams& p, unsigned char* xa, WaveEntries* entries) {
  WaveXaParams d{};
  d.batch = decode_batch(p.apply, apply_config_of(p.apply));
  d.xa = xa;
  d.entries = entries;
  LaunchShape shape{};
  shape.grid = dim3(
      static_cast<unsigned>(d.batch.tile_capacity + ceil_div(p.apply.num_tokens, kTileTokens)));
  shape.threads = kWaveXaThreads;
  shape.cluster = 1;
  shape.dependent = true;
  return launch_kernel(linear_wave_xa_kernel<kTokens>, shape, p.stream, d);
}

template <typename T, int kTokens>
cudaError_t launch_linear(const LinearParams& p, const unsigned char* xa,
                          const WaveEntries* entries) {
  const ApplyParams& apply = p.apply;
  LinearWaveParams d{};
  d.xa = xa;
  d.entries = entries;
  d.token_slots = apply.plan.token_slots;
  d.bias = p.bias;
  d.y = apply.y;
  d.y_stride = apply.y_stride;
  d.out_features = static_cast<int32_t>(p.out_features);
  d.in_features = static_cast<int32_t>(apply.in_features);
  d.num_tokens = static_cast<int32_t>(apply.num_tokens);
  d.num_slices = apply.slices.count;
  for (int i = 0; i < apply.slices.count; ++i) {
    d.slices[i] = {apply.b.base[i], apply.b.slot_stride[i], apply.slices.offset[i],
                   apply.slices.offset[i + 1], static_cast<int32_t>(apply.b.first_row[i])};
  }
  WaveMaps maps;
  if (!encode_map(maps.weight, apply.dtype,
                  {p.weight, apply.in_features, p.out_features, p.weight_stride},
                  kLinearWaveRows) ||
      !encode_map(maps.x, apply.dtype,
                  {apply.x, apply.in_features, apply.num_tokens, apply.x_stride}, kTokens)) {
    return cudaErrorInvalidValue;
  }
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(ceil_div(p.out_features, kLinearWaveRows)));
  shape.threads = kWaveThreads;
  shape.shared_bytes = Traits<kTokens>::kSharedBytes;
  shape.cluster = 1;
  shape.dependent = true;
  return launch_kernel(linear_wave_kernel<T, Traits<kTokens>>, shape, p.stream, d, maps);
}

}  // namespace

bool linear_wave_takes(const LinearParams& p) { return tokens_of(p) != 0; }

int64_t linear_wave_workspace(const LinearParams& p) { return Workspace(p, tokens_of(p)).size; }

int linear_wave(const LinearParams& p) {
  ApplyParams shrink = p.apply;
  shrink.stream = p.stream;
  const int error = apply_shrink(shrink);
  if (error != 0) {
    return error;
  }
  const int tokens = tokens_of(p);
  const Workspace workspace(p, tokens);
  float* const base = static_cast<float*>(p.apply.workspace);
  const auto xa = reinterpret_cast<unsigned char*>(base + workspace.xa);
  const auto entries = reinterpret_cast<WaveEntries*>(base + workspace.entries);
  return dispatch_tokens(tokens, [&](auto t) {
    constexpr int kTokens = decltype(t)::value;
    const cudaError_t failed = launch_xa<kTokens>(p, xa, entries);
    return failed != cudaSuccess ? failed : dispatch_half(p.apply.dtype, [&](auto type) {
      return launch_linear<typename decltype(type)::type, kTokens>(p, xa, entries);
    });
  });
}

}  // namespace lora_ext::cuda
