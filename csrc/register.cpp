// Every schema of torch.ops.lora_ext; the kernels register themselves in ops/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(lora_ext, m) {
  m.def(
      "plan_batch_(Tensor(a!) plan, Tensor slots, Tensor? seg_lens, Tensor? seg_indptr, "
      "int num_slots) -> ()");
  m.def(
      "lora_shrink(Tensor x, Tensor[] lora_a, Tensor ranks, Tensor scalings, Tensor plan, "
      "int num_slices, int max_rank, Tensor? a_offsets=None) -> Tensor");
  m.def(
      "lora_expand_(Tensor(a!) y, Tensor xa, Tensor[] lora_b, Tensor ranks, Tensor plan, "
      "int[] output_slices, int max_rank, Tensor? b_offsets=None) -> ()");
  m.def(
      "lora_apply_(Tensor(a!) y, Tensor x, Tensor[] lora_a, Tensor[] lora_b, Tensor ranks, "
      "Tensor scalings, Tensor plan, int[] output_slices, int max_rank, Tensor? a_offsets=None, "
      "Tensor? b_offsets=None, bool batch_invariant=False) -> ()");
  m.def(
      "lora_apply(Tensor y, Tensor x, Tensor[] lora_a, Tensor[] lora_b, Tensor ranks, "
      "Tensor scalings, Tensor plan, int[] output_slices, int max_rank, Tensor? a_offsets=None, "
      "Tensor? b_offsets=None, bool batch_invariant=False) -> Tensor");
  m.def(
      "lora_apply_backward(Tensor dy, Tensor x, Tensor[] lora_a, Tensor[] lora_b, Tensor ranks, "
      "Tensor scalings, Tensor plan, int[] output_slices, int max_rank, Tensor? a_offsets, "
      "Tensor? b_offsets, bool needs_dx, bool needs_da, bool needs_db) "
      "-> (Tensor dx, Tensor[] da, Tensor[] db)");
  m.def(
      "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] lora_a, Tensor[] lora_b, "
      "Tensor ranks, Tensor scalings, Tensor plan, int[] output_slices, int max_rank, "
      "Tensor? a_offsets=None, Tensor? b_offsets=None, bool batch_invariant=False, "
      "bool overlap=False) -> Tensor");
  m.def(
      "lora_fork(Tensor x, Tensor[] lora_a, Tensor ranks, Tensor scalings, Tensor plan, "
      "int[] output_slices, int max_rank, Tensor? a_offsets=None, bool batch_invariant=False, "
      "bool overlap=False) -> Tensor");
  m.def(
      "lora_join_(Tensor(a!) y, Tensor(b!) forked, Tensor x, Tensor[] lora_a, Tensor[] lora_b, "
      "Tensor ranks, Tensor scalings, Tensor plan, int[] output_slices, int max_rank, "
      "Tensor? a_offsets=None, Tensor? b_offsets=None, bool batch_invariant=False, "
      "bool overlap=False) -> ()");
  m.def(
      "lora_embedding(Tensor ids, Tensor lora_a, Tensor ranks, Tensor scalings, Tensor plan, "
      "int vocab_start=0, Tensor? extra_a=None) -> Tensor");
  m.def(
      "lora_embedding_apply_(Tensor(a!) y, Tensor ids, Tensor lora_a, Tensor lora_b, "
      "Tensor ranks, Tensor scalings, Tensor plan, int vocab_start=0, Tensor? extra_a=None) -> ()");
  m.def(
      "moe_lora_info(Tensor seg_indptr, Tensor seg_slots, Tensor ranks, int num_tokens) "
      "-> (Tensor token_slots, Tensor enabled)");
  m.def(
      "moe_lora_info_(Tensor(a!) token_slots, Tensor(b!) enabled, Tensor seg_indptr, "
      "Tensor seg_slots, Tensor ranks) -> ()");
  m.def(
      "moe_lora_align(Tensor topk_ids, Tensor token_slots, int num_slots, int num_experts, "
      "Tensor? expert_map=None) -> Tensor");
  m.def(
      "moe_lora_align_(Tensor(a!) routing, Tensor topk_ids, Tensor token_slots, int num_slots, "
      "int num_experts, Tensor? expert_map=None) -> ()");
  m.def(
      "moe_lora_apply_(Tensor(a!) y, Tensor x, Tensor[] lora_a, Tensor[] lora_b, Tensor ranks, "
      "Tensor scalings, Tensor routing, int top_k, int[] output_slices, int max_rank, "
      "int[]? column_starts=None, int column_stride=1, Tensor? topk_weights=None) -> ()");
}
