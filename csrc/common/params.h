// What a kernel is told: plain structs of pointers, strides and sizes, the same for the CUDA and
// the CPU kernels.
//
// Symbols: T tokens, K input features, S slices, N_i output features of slice i, L slots, R maximum
// rank, r_l rank of slot l. Strides and offsets count elements and are 64-bit throughout.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/moe_routing.h"
#include "common/plan.h"

namespace lora_ext {

constexpr int kMaxSlices = 8;
constexpr int kMaxRank = 1024;

enum class DType : int { kFloat32, kFloat16, kBFloat16, kFloat64 };

// One side (A or B) of a module's adapters, wherever it lies: the three layouts of DESIGN come down
// to this. Row `row` of slice i of slot l, in a slot of rank r, starts at
//   base[i] + slot_start + (first_row[i] + (rows_by_rank ? i * r : 0) + row) * (row_stride[i] ?
//   row_stride[i] : r)
// with slot_start = slot_offsets ? slot_offsets[l] : l * slot_stride[i].
struct Factor {
  const void* base[kMaxSlices];
  int64_t slot_stride[kMaxSlices];
  int64_t row_stride[kMaxSlices];  // 0: rows of r_l elements, one behind the other (flat B)
  int64_t first_row[kMaxSlices];   // packed B: where slice i starts
  const int64_t* slot_offsets;     // [L] flat layout, else null
  bool rows_by_rank;               // packed and flat A: slice i starts at row i * r_l

  LORA_EXT_HOST_DEVICE int64_t stride(int slice, int rank) const {
    return row_stride[slice] != 0 ? row_stride[slice] : rank;
  }
  LORA_EXT_HOST_DEVICE int64_t row_offset(int slot, int slice, int rank, int64_t row) const {
    const int64_t start = slot_offsets != nullptr ? slot_offsets[slot] : slot * slot_stride[slice];
    return start + (first_row[slice] + (rows_by_rank ? int64_t{slice} * rank : 0) + row) *
                       stride(slice, rank);
  }
};

// Output slices: slice i covers columns [offset[i], offset[i + 1]) of y.
struct Slices {
  int32_t count;
  int32_t offset[kMaxSlices + 1];
};

// plan_batch_: slots per token, or per segment with exactly one of seg_lens and seg_indptr.
struct PlanParams {
  const int32_t* slots;       // [n]
  const int32_t* seg_lens;    // [n] or null
  const int32_t* seg_indptr;  // [n + 1] or null
  int64_t n;
  PlanView plan;
  void* stream;
};

// How the wide shrink of an apply leaves xa for the expand: [place of a tile][token][columns]. In a
// row each slice has room for its rank rounded up to 16, and of every 16 columns those that a lane
// of a matrix product holds lie side by side: 2 q, 2 q + 1, 2 q + 8, 2 q + 9. Without parts, a
// tile's place is its number. Else all tiles by all steps of K are cut into equal parts across
// tiles, and each part has a place of its own for what it has summed up of a tile; the places lie
// behind those of the tiles where the shrink adds the parts up itself.
struct XaLayout {
  bool by_tile;  // else xa is a tensor with a row for each token
  bool summed;   // with parts: the expand finds their sums, as if there were none
  bool halves;   // four neighbours are those of a lane, split: high parts of two, of two, low ones
  int32_t most_tiles;
  int32_t parts;  // 0: tiles are never cut
  int32_t steps;  // of K, a tile

  struct Cut {
    int32_t used;          // parts that have steps
    int32_t each, longer;  // the first `longer` parts have one step more
    LORA_EXT_HOST_DEVICE int begin(int part) const {
      const int all = part < used ? part : used;
      return each * all + (all < longer ? all : longer);
    }
    LORA_EXT_HOST_DEVICE int part_of(int step) const {
      const int in_longer = longer * (each + 1);
      return step < in_longer ? step / (each + 1) : longer + (step - in_longer) / each;
    }
  };
  // Tiles that are fewer than parts are each cut into the same number of parts, unless that left
  // more than a quarter without any.
  LORA_EXT_HOST_DEVICE Cut cut(int num_tiles) const {
    const int even = num_tiles > 0 ? parts / num_tiles * num_tiles : 0;
    const int used = 4 * even >= 3 * parts ? even : parts;
    const int items = num_tiles * steps;
    return {used, items / used, items % used};
  }
  // Of what a part has summed up of a tile. Grows from one part or tile to the next, so no two are
  // at one place.
  LORA_EXT_HOST_DEVICE int place(int part, int tile) const {
    return part + tile + (summed ? most_tiles : 0);
  }
  // The expand finds a sum once, not in parts.
  LORA_EXT_HOST_DEVICE bool whole() const { return parts == 0 || summed; }
  LORA_EXT_HOST_DEVICE static int padded(int rank) { return (rank + 15) / 16 * 16; }
  LORA_EXT_HOST_DEVICE static int column(int position) {
    const int e = position % 4;
    return position / 16 * 16 + position % 16 / 4 * 2 + e % 2 + e / 2 * 8;
  }
};

// xa[t, i * r + j] = scaling * sum_k x[t, k] * A[j, k], for the slot of token t.
struct ShrinkParams {
  const void* x;  // [T, K]
  int64_t x_stride;
  DType dtype;  // of x and A
  Factor a;
  const int32_t* ranks;   // [L]
  const float* scalings;  // [L]
  PlanView plan;
  int64_t num_tokens;  // T
  int64_t in_features;
  int32_t num_slices, max_rank;
  void* xa;  // [T, S * R] fp32 (fp64 where dtype is)
  int64_t xa_stride;
  XaLayout layout;
  bool fill;  // write 0 where no adapter reaches; else those elements are left as they are
  void* stream;
};

// y[t, offset_i + n] += sum_j xa[t, i * r + j] * B[n, j], read and rounded once.
struct ExpandParams {
  const void* xa;  // [T, S * R] fp32 (fp64 where dtype is)
  int64_t xa_stride;
  XaLayout layout;
  void* y;  // [T, >= sum N_i]
  int64_t y_stride;
  DType dtype, y_dtype;  // of B, of y
  Factor b;
  const int32_t* ranks;
  PlanView plan;
  int64_t num_tokens;
  Slices slices;
  int32_t max_rank;
  bool after_xa;  // the kernel before in the stream wrote xa, and itself waited for all before it
  void* stream;
};

// Both, without a trip of the intermediate through memory where the kernel can.
struct ApplyParams {
  const void* x;
  int64_t x_stride;
  void* y;
  int64_t y_stride;
  DType dtype, y_dtype;
  Factor a, b;
  const int32_t* ranks;
  const float* scalings;
  PlanView plan;
  int64_t num_tokens, in_features;
  Slices slices;
  int32_t max_rank;
  bool batch_invariant;  // a row's bits must not depend on what else is in the batch
  bool beside;   // all but y is final; the first kernel may start before the one that writes y ends
  bool overlap;  // the shrink may run on a stream of its own, where no graph is captured
  void* reduction;  // a captured kernel beside whose predecessor the first one starts, and for
                    // whose end the second one waits; else null
  void* workspace;  // fp32 (fp64) elements, as many as the kernel's workspace function asks for
  void* stream;
};

// A base layer and its adapters: apply.y = x W^T + bias + what the apply would add, rounded once.
struct LinearParams {
  ApplyParams apply;
  const void* weight;  // [N, K]
  const void* bias;    // [N] or null
  int64_t weight_stride, out_features;
  void* stream;
};

// The two halves of an apply whose intermediate goes through its workspace.
inline ShrinkParams shrink_of(const ApplyParams& p) {
  ShrinkParams shrink{};
  shrink.x = p.x;
  shrink.x_stride = p.x_stride;
  shrink.dtype = p.dtype;
  shrink.a = p.a;
  shrink.ranks = p.ranks;
  shrink.scalings = p.scalings;
  shrink.plan = p.plan;
  shrink.num_tokens = p.num_tokens;
  shrink.in_features = p.in_features;
  shrink.num_slices = p.slices.count;
  shrink.max_rank = p.max_rank;
  shrink.xa = p.workspace;
  shrink.xa_stride = int64_t{p.slices.count} * p.max_rank;
  shrink.stream = p.stream;
  return shrink;
}

inline ExpandParams expand_of(const ApplyParams& p) {
  ExpandParams expand{};
  expand.xa = p.workspace;
  expand.xa_stride = int64_t{p.slices.count} * p.max_rank;
  expand.y = p.y;
  expand.y_stride = p.y_stride;
  expand.dtype = p.dtype;
  expand.y_dtype = p.y_dtype;
  expand.b = p.b;
  expand.ranks = p.ranks;
  expand.plan = p.plan;
  expand.num_tokens = p.num_tokens;
  expand.slices = p.slices;
  expand.max_rank = p.max_rank;
  expand.stream = p.stream;
  return expand;
}

// Gradients of an apply from dy, the gradient of its result. With g = scaling * dy B for each
// token,
//   dx = g A,   dA = the sum of g^T x and dB = the sum of dy^T xa over the tokens of a slot.
struct ApplyBackwardParams {
  ApplyParams apply;  // as it was, but y is dy, and workspace is for xa, where dB is wanted
  void* g;            // [T, S * R] fp32 (fp64 where dtype is), where dx or dA is wanted
  void* dx;           // [T, K], zeros, or null
  Factor da, db;      // of zeros, laid out as A and B are
  bool wants_da, wants_db;
  void* stream;
};

// xa[t, j] = scaling * A[slot, j, id - vocab_start], or extra_a[slot, id - vocab_start - V, j]
// behind the vocabulary.
struct EmbeddingParams {
  const void* ids;  // [T] int32 or int64
  bool ids_are_int64;
  const void* a;  // [L, R, V], any strides
  int64_t a_slot_stride, a_rank_stride, a_vocab_stride;
  const void* extra_a;  // [L, X, R] or null
  int64_t extra_slot_stride, extra_token_stride, num_extra;
  DType dtype;
  const int32_t* ranks;
  const float* scalings;
  PlanView plan;
  int64_t num_tokens, vocab_start, vocab_size;  // vocab_size: V
  int32_t max_rank;
  void* xa;  // [T, R] fp32 (fp64 where dtype is), fully written
  int64_t xa_stride;
  void* stream;
};

// y += xa B^T with such an xa, which goes through gather.xa where the kernel cannot do without.
struct EmbeddingApplyParams {
  EmbeddingParams gather;
  ExpandParams expand;
  void* stream;
};

// token_slots[t] = slot of the segment of t if its rank is not 0, else -1; enabled[l] = 1 where a
// token has slot l.
struct MoeInfoParams {
  const int32_t* seg_indptr;  // [n + 1]
  const int32_t* seg_slots;   // [n]
  const int32_t* ranks;       // [L]
  int64_t num_segments, num_slots, num_tokens;
  int32_t* token_slots;  // [num_tokens], the padding tail included
  int32_t* enabled;      // [L]
  void* stream;
};

// Pairs sorted by (slot, expert), stably, into a routing buffer.
struct MoeAlignParams {
  const void* topk_ids;  // [T, k] int32 or int64; -1: not routed
  bool ids_are_int64;
  const int32_t* token_slots;  // [T]
  const int32_t* expert_map;   // [num_global] id -> index of the weights or -1; null: ids are that
  int64_t num_pairs;           // T * k
  int32_t top_k, num_slots, num_experts, num_global;
  int32_t* routing;
  void* stream;
};

// One side (A or B) of an MoE module's adapters: a Factor for each expert. expert_stride is 0 where
// all experts share one.
struct MoeFactor : Factor {
  int64_t expert_stride[kMaxSlices];

  LORA_EXT_HOST_DEVICE int64_t row_offset(int slot, int expert, int slice, int rank,
                                          int64_t row) const {
    return Factor::row_offset(slot, slice, rank, row) + expert * expert_stride[slice];
  }
};

// y[p, start_i + stride * n] += weight[p] * scaling * sum_jk x[p / x_divisor, k] A[j, k] B[n, j]
// for the (slot, expert) of pair p, read and rounded once.
struct MoeApplyParams {
  const void* x;  // [P / x_divisor, K]
  int64_t x_stride;
  int32_t x_divisor;
  void* y;  // [P, ...]
  int64_t y_stride;
  DType dtype, y_dtype;
  MoeFactor a, b;
  const int32_t* ranks;
  const float* scalings;
  const int32_t* routing;
  int64_t routing_size;
  int64_t num_pairs, in_features;
  int32_t num_slots;
  int32_t num_experts;  // of the weights; the most that an int32 holds where both sides are shared
  Slices slices;
  int64_t column_start[kMaxSlices];
  int64_t column_stride;
  int32_t max_rank;
  const void* topk_weights;  // [P] or null
  DType weights_dtype;
  void* workspace;  // as many bytes as the kernel's workspace function asks for
  void* stream;
};

}  // namespace lora_ext
