#include "cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace lora_ext::cpu {

void run_on_threads(void (*task)(void* context), void* context) {
  // One index per thread: which indices a thread gets does not matter, because the tasks share a
  // counter.
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1,
                              [=](int64_t, int64_t) { task(context); });
}

}  // namespace lora_ext::cpu
