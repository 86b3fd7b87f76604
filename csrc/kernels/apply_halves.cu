#include "kernels/apply_halves.h"
#include "kernels/beside.h"
#include "kernels/kernels.h"
#include "kernels/side_stream.h"

namespace lora_ext::cuda {
namespace {

bool forks(const ApplyParams& p) { return p.overlap && apply_has_halves(p); }

}  // namespace

int apply_fork(const ApplyParams& p) {
  if (keep_last_captured(p.stream, p.workspace) || !forks(p)) {
    return 0;
  }
  ApplyParams beside = p;
  const int error = fork_stream(p.stream, &beside.stream);
  if (error != 0) {
    return error;
  }
  const int launched = apply_shrink(beside);
  return launched == 0 ? 0 : (join_stream(p.stream), launched);
}

int apply_join(const ApplyParams& p) {
  const std::optional<void*> before = take_last_captured(p.workspace);
  if (!before.has_value() && forks(p)) {
    const int error = join_stream(p.stream);
    return error == 0 ? apply_expand(p) : error;
  }
  ApplyParams all = p;
  if (before.has_value() && apply_runs_beside(p)) {
    const Beside beside = start_beside_last(p.stream, *before);
    all.beside = beside.possible;
    all.reduction = beside.reduction;
  }
  return apply(all);
}

int apply_abandon(const ApplyParams& p) {
  const bool captured = take_last_captured(p.workspace).has_value();
  return !captured && forks(p) ? join_stream(p.stream) : 0;
}

}  // namespace lora_ext::cuda
