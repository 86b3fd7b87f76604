#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include "kernels/tensor_map.h"

namespace lora_ext::cuda {
namespace {

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

}  // namespace

bool has_tensor_maps() { return encode_tiled() != nullptr; }

bool encode_map(CUtensorMap& map, DType dtype, const MapShape& shape, int box_rows) {
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(shape.columns),
                               static_cast<cuuint64_t>(shape.rows),
                               static_cast<cuuint64_t>(shape.planes)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(2 * shape.row_stride),
                                 static_cast<cuuint64_t>(2 * shape.plane_stride)};
  const cuuint32_t box[3] = {kBoxColumns, static_cast<cuuint32_t>(box_rows), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  return encode_tiled()(&map,
                        dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                  : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                        shape.planes > 0 ? 3 : 2, const_cast<void*>(shape.base), sizes, strides,
                        box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace lora_ext::cuda
