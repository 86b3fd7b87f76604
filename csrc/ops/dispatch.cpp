#include "ops/dispatch.h"

// It lives in libtorch_cuda, which a CPU-only torch does not have: weak, so that one binary loads
// in both.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace lora_ext {

void* current_stream(const Tensor& like) {
  check(aoti_torch_get_current_cuda_stream != nullptr,
        "the tensors are on a CUDA device, but this torch offers no CUDA stream");
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream) == 0,
        "torch has no current stream on ", describe(like));
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
