// Kernels that run beside the one before them in a stream, in a CUDA graph: a kernel that says
// nothing of it, as a base layer's product, lets nothing start before its end, but a captured edge
// may be one from where the last of its thread blocks began.
#pragma once

#include <optional>

namespace lora_ext::cuda {

// Keeps, under `key`, the node that a stream's capture ends in: null where there is no single last
// one. Outside of a capture false, and what was kept there before is forgotten.
bool keep_last_captured(void* stream, const void* key);
// Takes it out again; nothing where none was kept since.
std::optional<void*> take_last_captured(const void* key);

// Lets the kernel that is captured next start when the last one's thread blocks all have: what that
// one read is final, what it writes is not. Of the kernels since `before`, the node that was kept
// then. False, and nothing has changed, where that cannot be had: outside of a capture, behind what
// is no kernel, behind one that itself started before the end of another.
bool start_beside_last(void* stream, void* before);

}  // namespace lora_ext::cuda
