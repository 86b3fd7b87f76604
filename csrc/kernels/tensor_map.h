// Tensor maps, which describe to Hopper's copy engine where boxes of a tensor lie.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/params.h"

namespace lora_ext::cuda {

constexpr int kBoxColumns = 64;  // 128 bytes of a row, which is what the swizzle spans

// [planes, rows, columns] values of 16 bits; strides in elements.
struct MapShape {
  const void* base;
  int64_t columns, rows, row_stride;
  int64_t planes = 0, plane_stride = 0;  // 0 planes: a matrix
};

// Whether the driver makes tensor maps.
bool has_tensor_maps();
// A map for boxes of box_rows rows (of one plane) by kBoxColumns, swizzled as the products of a
// warpgroup want them. False where the driver refuses.
bool encode_map(CUtensorMap& map, DType dtype, const MapShape& shape, int box_rows);

}  // namespace lora_ext::cuda
