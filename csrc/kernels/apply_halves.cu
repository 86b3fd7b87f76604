#include "kernels/apply_halves.h"
#include "kernels/kernels.h"
#include "kernels/side_stream.h"

namespace lora_ext::cuda {

int64_t halves_workspace(const ApplyParams& p) {
  return p.num_tokens * p.slices.count * p.max_rank;
}

int apply_fork(const ApplyParams& p) {
  ShrinkParams down = shrink_of(p);
  const int error = fork_stream(p.stream, &down.stream);
  if (error != 0) {
    return error;
  }
  const int launched = shrink(down);
  return launched == 0 ? 0 : (join_stream(p.stream), launched);
}

// Not after_xa: the kernel before this one in the stream is the base layer's, which writes y.
int apply_join(const ApplyParams& p) {
  const int error = join_stream(p.stream);
  return error == 0 ? expand(expand_of(p)) : error;
}

}  // namespace lora_ext::cuda
