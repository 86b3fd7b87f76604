// Kernels that run beside the one before them in a stream, in a CUDA graph: a kernel that says
// nothing of it, as a base layer's product, lets nothing start before its end, but a captured edge
// may be one from where the last of its thread blocks began.
#pragma once

#include <optional>

namespace lora_ext::cuda {

// Lets the kernel that is captured next start when the last one's thread blocks all have; that it
// waits for the end, as for a kernel before it that lets it start, is its own business. Nothing
// changes, and false, outside of a capture, and where the last one is no kernel or itself began
// before the end of another.
bool start_early(void* stream);
// Takes that back, where nothing was captured since.
void start_late(void* stream);

// Keeps, under `key`, the node that a stream's capture ends in: null where there is no single last
// one. Outside of a capture false, and what was kept there before is forgotten.
bool keep_last_captured(void* stream, const void* key);
// Takes it out again; nothing where none was kept since.
std::optional<void*> take_last_captured(const void* key);

// What a kernel is started beside.
struct Beside {
  bool possible;
  void* reduction;  // the kernel behind it, which began before its end, as that of a product whose
                    // K is divided; else null
};

// Lets the kernel that is captured next start when the last one's thread blocks all have, or where
// that is a reduction, those of the one before it: what they read is final, what they write is not.
// Of the kernels since `before`, the node that was kept then. Not possible, and nothing has
// changed, outside of a capture, behind what is no kernel, behind one that itself started otherwise
// before the end of another.
Beside start_beside_last(void* stream, void* before);

// Lets the kernel that is captured next start when the last one lets it and the thread blocks of
// `reduction` have begun; it waits for the end of both. A cudaError_t.
int start_behind_both(void* stream, void* reduction);

}  // namespace lora_ext::cuda
