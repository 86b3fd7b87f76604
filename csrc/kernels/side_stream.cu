// A second stream beside each stream of the caller, made when it is first asked for and kept.
//
// One for each, not one for all: a stream that joins a capture belongs to it until the capture
// ends, so that two captures, or a capture and an eager call of another thread, cannot share one.
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

#include "kernels/side_stream.h"

namespace lora_ext::cuda {
namespace {

struct SideStream {
  cudaStream_t stream;
  cudaEvent_t forked, joined;
};

// Lets a capture that is in force go on while this thread makes streams and events.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

cudaError_t make(SideStream& side) {
  const RelaxedCapture relaxed;
  int least = 0, greatest = 0;
  cudaError_t error = cudaDeviceGetStreamPriorityRange(&least, &greatest);
  // The shrink is short, and the base layer's thread blocks would fill the chip before it.
  if (error == cudaSuccess) {
    error = cudaStreamCreateWithPriority(&side.stream, cudaStreamNonBlocking, greatest);
  }
  if (error == cudaSuccess) {
    error = cudaEventCreateWithFlags(&side.forked, cudaEventDisableTiming);
  }
  if (error == cudaSuccess) {
    error = cudaEventCreateWithFlags(&side.joined, cudaEventDisableTiming);
  }
  return error;
}

// Streams live as long as the process: at its end the driver may be gone before this would be.
cudaError_t side_of(cudaStream_t stream, SideStream& side) {
  static std::mutex mutex;
  static auto* const sides = new std::map<std::pair<int, cudaStream_t>, SideStream>;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) {
    return error;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = sides->find({device, stream});  // the default stream is null on every device
  if (found != sides->end()) {
    side = found->second;
    return cudaSuccess;
  }
  error = make(side);
  if (error == cudaSuccess) {
    sides->emplace(std::make_pair(device, stream), side);
  }
  return error;
}

// The last error is cleared where a call fails: it is reported here, and must not fail the next
// launch too.
int reported(cudaError_t error) {
  if (error != cudaSuccess) {
    cudaGetLastError();
  }
  return error;
}

}  // namespace

int fork_stream(void* stream, void** side) {
  const auto main = static_cast<cudaStream_t>(stream);
  SideStream beside{};
  cudaError_t error = side_of(main, beside);
  if (error == cudaSuccess) {
    error = cudaEventRecord(beside.forked, main);
  }
  if (error == cudaSuccess) {
    error = cudaStreamWaitEvent(beside.stream, beside.forked, 0);
  }
  *side = beside.stream;
  return reported(error);
}

int join_stream(void* stream) {
  const auto main = static_cast<cudaStream_t>(stream);
  SideStream beside{};
  cudaError_t error = side_of(main, beside);
  if (error == cudaSuccess) {
    error = cudaEventRecord(beside.joined, beside.stream);
  }
  if (error == cudaSuccess) {
    error = cudaStreamWaitEvent(main, beside.joined, 0);
  }
  return reported(error);
}

}  // namespace lora_ext::cuda
