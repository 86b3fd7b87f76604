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

// What is captured next depends on these, and on nothing else.
cudaError_t set_dependencies(void* stream, cudaGraphNode_t* nodes, const cudaGraphEdgeData* edges,
                             size_t count) {
#if CUDART_VERSION >= 13000
  constexpr auto kUpdate = cudaStreamUpdateCaptureDependencies;
#else
  constexpr auto kUpdate = cudaStreamUpdateCaptureDependencies_v2;
#endif
  return kUpdate(static_cast<cudaStream_t>(stream), nodes, edges, count,
                 cudaStreamSetCaptureDependencies);
}

// An edge of a kernel that waits for the end of the one before, but starts earlier: from `port` on.
constexpr cudaGraphEdgeData early_edge(unsigned char port) {
  cudaGraphEdgeData edge{};
  edge.from_port = port;
  edge.type = cudaGraphDependencyTypeProgrammatic;
  return edge;
}

// An older driver knows none of this; that must not fail the next launch.
bool succeeds(cudaError_t error) {
  if (error != cudaSuccess) {
    cudaGetLastError();
  }
  return error == cudaSuccess;
}

// How a kernel stands behind others.
struct Begin {
  bool whole;              // behind the end of all that it depends on
  cudaGraphNode_t behind;  // the only one that it depends on, else null
};

// Nothing where the node is no kernel.
std::optional<Begin> begin_of(cudaGraphNode_t node) {
  cudaGraphNodeType type{};
  cudaGraphNode_t nodes[kMostEdges];
  cudaGraphEdgeData edges[kMostEdges];
  size_t count = 0;
  if (!succeeds(cudaGraphNodeGetType(node, &type)) || type != cudaGraphNodeTypeKernel ||
      !succeeds(kGetDependencies(node, nullptr, nullptr, &count)) || count > kMostEdges) {
    return std::nullopt;
  }
  if (count > 0 && !succeeds(kGetDependencies(node, nodes, edges, &count))) {  // 0 is refused
    return std::nullopt;
  }
  bool whole = true;
  for (size_t i = 0; i < count; ++i) {
    whole &= edges[i].type == cudaGraphDependencyTypeDefault;
  }
  return Begin{whole, count == 1 ? nodes[0] : nullptr};
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

bool start_early(void* stream) {
  cudaGraphNode_t last = last_captured(stream).value_or(nullptr);
  if (last == nullptr) {
    return false;
  }
  const std::optional<Begin> begin = begin_of(last);
  const cudaGraphEdgeData edge = early_edge(cudaGraphKernelNodePortLaunchCompletion);
  return begin.has_value() && begin->whole && succeeds(set_dependencies(stream, &last, &edge, 1));
}

void start_late(void* stream) {
  if (cudaGraphNode_t last = last_captured(stream).value_or(nullptr)) {
    const cudaGraphEdgeData edge{};
    succeeds(set_dependencies(stream, &last, &edge, 1));
  }
}

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

Beside start_beside_last(void* stream, void* before) {
  cudaGraphNode_t last = last_captured(stream).value_or(nullptr);
  Beside beside{};
  if (!device_properties().clusters) {
    return beside;
  }
  while (last != nullptr && last != before) {
    const std::optional<Begin> begin = begin_of(last);
    if (begin.has_value() && begin->whole) {
      const cudaGraphEdgeData edge = early_edge(cudaGraphKernelNodePortLaunchCompletion);
      beside.possible = succeeds(set_dependencies(stream, &last, &edge, 1));
      return beside;
    }
    if (!begin.has_value() || beside.reduction != nullptr) {
      break;
    }
    beside.reduction = last;
    last = begin->behind;
  }
  return {};
}

int start_behind_both(void* stream, void* reduction) {
  cudaGraphNode_t nodes[] = {last_captured(stream).value_or(nullptr),
                             static_cast<cudaGraphNode_t>(reduction)};
  const cudaGraphEdgeData edges[] = {early_edge(cudaGraphKernelNodePortProgrammatic),
                                     early_edge(cudaGraphKernelNodePortLaunchCompletion)};
  const cudaError_t error = set_dependencies(stream, nodes, edges, 2);
  succeeds(error);  // or the next launch would fail, too
  return error;
}

}  // namespace lora_ext::cuda
