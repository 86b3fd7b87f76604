// An apply in two halves, with a base layer between them, beside which the first one runs.
#pragma once

#include <cstdint>

#include "common/params.h"

namespace lora_ext {

namespace cuda {

// The first makes params.workspace from x and A, on the side stream of params.stream; the second
// joins, and adds workspace and B to y.
int apply_fork(const ApplyParams& params);
int apply_join(const ApplyParams& params);

}  // namespace cuda
}  // namespace lora_ext
