// Kernels that run beside the one before them in a stream, in a CUDA graph: a kernel that says
// nothing of it, as a base layer's product, lets nothing start before its end, but a captured edge
// may be one from where the last of its thread blocks began.
#pragma once

namespace lora_ext::cuda {

// The node that a stream's capture ends in; null where there is no capture, or no single last node.
void* last_captured(void* stream);

// Lets the kernel that is captured next start when the last one's thread blocks all have: what that
// one read is final, what it writes is not. Of the kernels since `before`, which last_captured said
// then. False, and nothing has changed, where that cannot be had: outside of a capture, behind what
// is no kernel, behind one that itself started before the end of another.
bool start_beside_last(void* stream, void* before);

}  // namespace lora_ext::cuda
