#include "ops/dispatch.h"

// It lives in libtorch_cuda, which a CPU-only torch does not have: weak, so that one binary loads
// in both.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace lora_ext {

void* current_stream(int device) {
  check(aoti_torch_get_current_cuda_stream != nullptr,
        "the tensors are on a CUDA device, but this torch offers no CUDA stream");
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(device, &stream) == 0,
        "torch has no current stream on CUDA device ", device);
  return stream;
}

void check_launch(const char* op, int error) {
#ifdef LORA_EXT_CUDA
  check(error == 0, op, ": the launch failed: ", cuda::error_string(error));
#else
  check(error == 0, op, ": the launch failed with error ", error);
#endif
}

}  // namespace lora_ext
