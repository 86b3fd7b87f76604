// The shrink of an embedding on the CPU: one column of A per token, gathered, scaled and widened.

#include <cstring>

#include "cpu/kernels.h"
#include "cpu/microkernels.h"
#include "cpu/parallel.h"

namespace lora_ext::cpu {
namespace {

// Where the token's column of A lies, and the stride between its elements; null where no adapter
// has this id.
struct Column {
  const void* start = nullptr;
  int64_t stride = 0;
};

Column find_column(const EmbeddingParams& p, int64_t token, int32_t slot) {
  const int64_t element = element_bytes(p.dtype);
  const int64_t id = p.ids_are_int64 ? static_cast<const int64_t*>(p.ids)[token]
                                     : static_cast<const int32_t*>(p.ids)[token];
  if (id < p.vocab_start) return {};
  const int64_t local = id - p.vocab_start;
  if (local < p.vocab_size) {
    const int64_t offset = slot * p.a_slot_stride + local * p.a_vocab_stride;
    return {static_cast<const char*>(p.a) + offset * element, p.a_rank_stride};
  }
  if (p.extra_a == nullptr || local >= p.vocab_size + p.num_extra) return {};
  const int64_t offset = slot * p.extra_slot_stride + (local - p.vocab_size) * p.extra_token_stride;
  return {static_cast<const char*>(p.extra_a) + offset * element, 1};
}

}  // namespace

void embedding(const EmbeddingParams& p) {
  const int64_t bytes = accumulator_bytes(p.dtype);
  parallel_for(p.num_tokens, p.num_tokens * p.max_rank, [&](int64_t token) {
    char* const out = static_cast<char*>(p.xa) + token * p.xa_stride * bytes;
    const int32_t slot = p.plan.token_slots[token];
    int64_t written = 0;
    if (slot >= 0) {
      const Column column = find_column(p, token, slot);
      if (column.start != nullptr) {
        written = slot_rank(p.ranks, slot, p.max_rank);
        microkernels().gather[static_cast<int>(p.dtype)](
            GatherParams{column.start, column.stride, written, p.scalings[slot], out});
      }
    }
    std::memset(out + written * bytes, 0, (p.max_rank - written) * bytes);
  });
}

void embedding_apply(const EmbeddingApplyParams& p) {
  embedding(p.gather);
  expand(p.expand);
}

}  // namespace lora_ext::cpu
