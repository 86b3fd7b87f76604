// An apply in two halves, with a base layer between them, beside which the first one runs.
#pragma once

#include <cstdint>

#include "common/params.h"

namespace lora_ext {

// Whether the first half of a site's apply runs beside its base layer instead of both behind it. It
// hides the shrink but costs a fork and a join, 1 to 2 us, which a short K does not take.
constexpr int64_t kOverlapMinFeatures = 1024;
inline bool site_overlaps(int64_t in_features, bool batch_invariant) {
  // The wide kernels split K by the size of the batch.
  return !batch_invariant && in_features >= kOverlapMinFeatures;
}

namespace cuda {

// The first makes params.workspace from x and A, on the side stream of params.stream; the second
// joins, and adds workspace and B to y.
int64_t halves_workspace(const ApplyParams& params);  // fp32 elements
int apply_fork(const ApplyParams& params);
int apply_join(const ApplyParams& params);

}  // namespace cuda
}  // namespace lora_ext
