// The decode apply of wide tiles, as apply.cu calls it.
#pragma once

#include <cstdint>

#include "common/params.h"
#include "kernels/wide_heuristics.h"

namespace lora_ext::cuda {

// Whether the kernels can serve: ranks that their registers and shared memory hold, rows that allow
// copies of 16 bytes, a chip with wgmma.
bool decode_wide_takes(const ApplyParams& params);
int64_t decode_wide_workspace(const ApplyParams& params, const WideSplit& split);  // fp32
int decode_wide_shrink(const ApplyParams& params, const WideSplit& split);
int decode_wide_expand(const ApplyParams& params, const WideSplit& split);

}  // namespace lora_ext::cuda
