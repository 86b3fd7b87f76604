// Each stream of the caller has a second one beside it, for what may run at the same time.
#pragma once

namespace lora_ext::cuda {

// What is queued on `side` from now on waits for all that is queued on `stream`.
int fork_stream(void* stream, void** side);
// The reverse. Both may be captured, and return a cudaError_t.
int join_stream(void* stream);

}  // namespace lora_ext::cuda
