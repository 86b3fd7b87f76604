#include "kernels/apply_halves.h"
#include "kernels/kernels.h"
#include "kernels/side_stream.h"

namespace lora_ext::cuda {

int apply_fork(const ApplyParams& p) {
  ApplyParams beside = p;
  const int error = fork_stream(p.stream, &beside.stream);
  if (error != 0) {
    return error;
  }
  const int launched = apply_shrink(beside);
  return launched == 0 ? 0 : (join_stream(p.stream), launched);
}

// The kernel before this one in the stream is the base layer's, which writes y.
int apply_join(const ApplyParams& p) {
  const int error = join_stream(p.stream);
  return error == 0 ? apply_expand(p, false) : error;
}

}  // namespace lora_ext::cuda
