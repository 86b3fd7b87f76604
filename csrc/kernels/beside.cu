#include <mutex>
#include <unordered_map>

#include "kernels/beside.h"
#include "kernels/launch.cuh"

namespace lora_ext::cuda {
namespace {

constexpr size_t kMostEdges = 8;

// CUDA 13 gave the functions that know of edges the names of those that did not.
#if CUDART_VERSION >= 13000
constexpr auto kGetDependencies =
    static_cast<cudaError_t (*)(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t*)>(
        cudaGraphNodeGetDependencies);
#else
constexpr auto kGetDependencies = cudaGraphNodeGetDependencies_v2;
#endif

cudaError_t get_capture(cudaStream_t stream, cudaStreamCaptureStatus* status,
                        const cudaGraphNode_t** nodes, size_t* count) {
  const cudaGraphEdgeData* edges = nullptr;
#if CUDART_VERSION >= 13000
  return cudaStreamGetCaptureInfo(stream, status, nullptr, nullptr, nodes, &edges, count);
#else
  return cudaStreamGetCaptureInfo_v3(stream, status, nullptr, nullptr, nodes, &edges, count);
#endif
}

cudaError_t set_dependency(cudaStream_t stream, cudaGraphNode_t node,
                           const cudaGraphEdgeData& edge) {
#if CUDART_VERSION >= 13000
  return cudaStreamUpdateCaptureDependencies(stream, &node, &edge, 1,
                                             cudaStreamSetCaptureDependencies);
#else
  return cudaStreamUpdateCaptureDependencies_v2(stream, &node, &edge, 1,
                                                cudaStreamSetCaptureDependencies);
#endif
}

// An older driver knows none of this; that must not fail the next launch.
bool succeeds(cudaError_t error) {
  if (error != cudaSuccess) {
    cudaGetLastError();
  }
  return error == cudaSuccess;
}

// Whether the node is a kernel that starts behind the end of all that it depends on.
bool is_whole_kernel(cudaGraphNode_t node) {
  cudaGraphNodeType type{};
  cudaGraphNode_t nodes[kMostEdges];
  cudaGraphEdgeData edges[kMostEdges];
  size_t count = 0;
  if (!succeeds(cudaGraphNodeGetType(node, &type)) || type != cudaGraphNodeTypeKernel ||
      !succeeds(kGetDependencies(node, nullptr, nullptr, &count)) || count > kMostEdges) {
    return false;
  }
  if (count > 0 && !succeeds(kGetDependencies(node, nodes, edges, &count))) {  // 0 is refused
    return false;
  }
  bool whole = true;
  for (size_t i = 0; i < count; ++i) {
    whole &= edges[i].type == cudaGraphDependencyTypeDefault;
  }
  return whole;
}

// What the stream's capture ends in, null where that is no single node; nothing without a capture.
std::optional<cudaGraphNode_t> last_captured(void* stream) {
  cudaStreamCaptureStatus status{};
  const cudaGraphNode_t* nodes = nullptr;
  size_t count = 0;
  if (!succeeds(get_capture(static_cast<cudaStream_t>(stream), &status, &nodes, &count)) ||
      status != cudaStreamCaptureStatusActive) {
    return std::nullopt;
  }
  return count == 1 ? nodes[0] : nullptr;
}

struct Kept {
  std::mutex mutex;
  std::unordered_map<const void*, void*> nodes;
};

// Never destroyed: another thread may still be capturing when the process ends.
Kept& kept() {
  static auto* const all = new Kept;
  return *all;
}

}  // namespace

bool keep_last_captured(void* stream, const void* key) {
  const std::optional<cudaGraphNode_t> last = last_captured(stream);
  const std::lock_guard<std::mutex> lock(kept().mutex);
  kept().nodes.erase(key);
  if (last.has_value()) {
    kept().nodes.emplace(key, *last);
  }
  return last.has_value();
}

std::optional<void*> take_last_captured(const void* key) {
  const std::lock_guard<std::mutex> lock(kept().mutex);
  const auto found = kept().nodes.find(key);
  if (found == kept().nodes.end()) {
    return std::nullopt;
  }
  void* const node = found->second;
  kept().nodes.erase(found);
  return node;
}

bool start_beside_last(void* stream, void* before) {
  const cudaGraphNode_t last = last_captured(stream).value_or(nullptr);
  if (last == nullptr || last == before || !device_properties().clusters ||
      !is_whole_kernel(last)) {
    return false;
  }
  cudaGraphEdgeData edge{};
  edge.from_port = cudaGraphKernelNodePortLaunchCompletion;
  edge.type = cudaGraphDependencyTypeProgrammatic;
  return succeeds(set_dependency(static_cast<cudaStream_t>(stream), last, edge));
}

}  // namespace lora_ext::cuda
