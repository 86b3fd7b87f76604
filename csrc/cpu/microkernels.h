// The inner loops of the CPU kernels, compiled once per instruction set and chosen at run time, so
// that a portable wheel still uses wide vectors. Everything around them is compiled once.
#pragma once

#include "common/params.h"

namespace lora_ext::cpu {

// out[t][j] = scaling * dot(x[t], A row j). out holds fp32, or fp64 where x and A do.
struct DotParams {
  const void* const* x;  // a row per token
  int64_t num_tokens;
  const void* a;  // [num_rows, k]
  int64_t a_stride;
  int64_t num_rows, k;
  float scaling;
  void* const* out;  // per token, where the element of A's first row goes
};

// A panel is a block of rows of B (one vector's worth), transposed to [rank, lanes] fp32 (fp64):
// each of its vectors then serves all tokens, and no sum runs across lanes.
struct PackParams {
  const void* b;  // [num_rows, rank]
  int64_t b_stride;
  int64_t num_rows;  // 1 ... lanes
  int64_t rank;      // >= 1
  void* panel;
};

// y[t][n] += sum_j xa[t][j] * panel[j][n]
struct AccumulateParams {
  const void* panel;
  int64_t rank, num_columns;
  const void* const* xa;  // a row of `rank` elements per token
  void* const* y;         // per token, where the panel's first column lies
  int64_t num_tokens;
};

// out[i] = scaling * from[i * stride]
struct GatherParams {
  const void* from;
  int64_t stride, count;
  float scaling;
  void* out;
};

// to[i][n] = from[i][first + n], in fp32 (fp64)
struct WidenParams {
  const void* const* from;  // a row each
  int64_t num_rows, first, count;
  void* to;
  int64_t to_stride;
};

// to[n] = from[n], rounded; from holds fp32, or fp64 where `to` does.
struct NarrowParams {
  const void* from;
  int64_t count;
  void* to;
};

constexpr int kNumDTypes = 4;
constexpr int kMaxLanes = 16;  // fp32 elements of the widest vector
constexpr int kMaxPanelBytes = kMaxRank * kMaxLanes * static_cast<int>(sizeof(float));

struct Microkernels {
  const char* name;
  int vector_bytes;
  void (*dot[kNumDTypes])(const DotParams&);                   // by dtype of x and A
  void (*gather[kNumDTypes])(const GatherParams&);             // by dtype of A
  void (*pack[kNumDTypes])(const PackParams&);                 // by dtype of B
  void (*accumulate[2][kNumDTypes])(const AccumulateParams&);  // by (panel is fp64), dtype of y

  void (*widen[2][kNumDTypes])(const WidenParams&);  // by (to is fp64), dtype of from
  void (*narrow[kNumDTypes])(const NarrowParams&);   // by dtype of to

  int lanes(DType dtype) const { return vector_bytes / (dtype == DType::kFloat64 ? 8 : 4); }
};

extern const Microkernels kBaselineMicrokernels;
extern const Microkernels kAvx2Microkernels;
extern const Microkernels kAvx512Microkernels;

// The best set this machine runs. LORA_EXT_CPU_ISA=baseline|avx2|avx512 in the environment caps it
// (read once), which is how the narrower ones are tested on a wide machine.
const Microkernels& microkernels();

inline int64_t accumulator_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

inline int64_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

// Ranks come from a tensor: whatever it holds, no kernel reads beyond the pool's rows.
inline int slot_rank(const int32_t* ranks, int32_t slot, int32_t max_rank) {
  const int32_t rank = ranks[slot];
  return rank < 0 ? 0 : rank > max_rank ? max_rank : rank;
}

}  // namespace lora_ext::cpu
