// An apply around a base layer, beside which its shrink runs.
#pragma once

#include "common/params.h"

namespace lora_ext::cuda {

// Before the base layer: with params.overlap, and where the apply has halves, starts the shrink,
// from x and A to params.workspace, on the side stream of params.stream. In a capture nothing
// starts yet.
int apply_fork(const ApplyParams& params);
// Behind it: joins, and adds workspace and B to y; or all of the apply, of which in a capture the
// shrink begins beside the base layer's last kernel.
int apply_join(const ApplyParams& params);
// In its place where the base layer has failed: nothing uses the workspace from now on.
int apply_abandon(const ApplyParams& params);

}  // namespace lora_ext::cuda
