// What the wide shrink and expand of an apply know of each other: which kernel shrinks, and how it
// leaves xa.
#pragma once

#include <cstdint>

#include "common/params.h"

namespace lora_ext::cuda {

// Whether the machine code that this device runs has wgmma.
bool has_wgmma();
// x and A allow 16-byte copies, as far as the host knows.
bool shrink_is_vector(const ShrinkParams& params);
// Whether the kernel with wgmma can serve: its copies need what a tensor map can say.
bool shrink_takes_wgmma(const ShrinkParams& params);
int shrink_wgmma(const ShrinkParams& params);

// The layout that the shrink would choose; all zero where it writes a row for each token only.
XaLayout shrink_layout(const ShrinkParams& params);
// Elements that such a layout takes, whichever way these very tensors lie.
int64_t shrink_layout_elements(const ShrinkParams& params);
// Whether the wide expand can read it.
bool expand_reads_tiles(const ExpandParams& params);

}  // namespace lora_ext::cuda
