"""LoRABackend: what an inference engine calls, method for method as SGLang's backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..compat import (
    sgemm_lora_a_embedding_fwd,
    sgemm_lora_a_fwd,
    sgemm_lora_b_fwd,
    slice_widths,
)
from ..moe import ExpertLoRA, LoRAHooks, align_routing, lora_hooks
from .batch_info import LoRABatchInfo
from .preparation import BatchPreparation
from .site import Site

Offsets = Sequence[int] | Tensor


class LoRABackend(BatchPreparation):
    """The LoRA of all layers of a model; one batch at a time.

    An engine calls a ``prepare_*`` method before each forward pass and the ``run_*`` methods, or
    ``forward_with_base``, in its layers. Eager passes and captured graphs run the same operators:
    a graph reads the static info made by an ``init_*`` method, which ``prepare_lora_batch``
    refreshes in place, so it holds for every later batch that fits. Nothing waits for the device.

    Slot -1 and a slot of rank 0 both mean "no adapter". x is ``[T, K]``; weights are packed, A
    ``[L, S * R, K]`` with slice i of slot l in rows ``i * r_l`` and following, B
    ``[L, sum N_i, R]``, of one dtype. Outputs are added to in place and returned.

    Args:
        max_loras_per_batch: L, the slots of the weights.
        device: where the layers run.
        server_args: SGLang's; nothing in it is used.
        batch_invariant: a row's bits do not depend on the other rows of its batch.
        logprobs_chunk_size: rows of each pass where the engine calls lm_head for parts of the
            pruned rows; None: one pass.
        overlap: whether ``forward_with_base`` runs the first half of its work beside the base
            layer, on a second stream of the GPU, where no graph is captured. In a graph that half
            runs beside the base layer's end in any case. The bits are the same.

    Attributes:
        batch_info: of the batch prepared last; None: none, and layers compute their base.
        lm_head_batch_info: of the rows that lm_head sees, where those are not all.
        lm_head_pass_batch_infos: of each pass, where there are several.
        prefill_cuda_graph_max_bs, prefill_cuda_graph_max_tokens: what the static prefill info can
            hold; None: there is none.
        is_moe_lora: whether there are MoE layers, whose ``moe_lora_info`` is then prepared.
        moe_cg_buffers, prefill_moe_cg_buffers: what the MoE layers of graphs share; the MoEBuffers
            are there under "moe_buffers".
    """

    name: ClassVar[str] = "lora_ext"
    supports_lora_a_overlap: ClassVar[bool] = False
    skip_inactive_lora_batches: ClassVar[bool] = False
    # SGLang then captures another graph of the base model, for batches without adapters.
    skip_inactive_dense_lora: ClassVar[bool] = True
    supports_prefill_cuda_graph: ClassVar[bool] = True
    supports_dp_attention: ClassVar[bool] = False

    def __init__(
        self,
        max_loras_per_batch: int,
        device: torch.device | str,
        server_args: object = None,
        *,
        batch_invariant: bool = False,
        logprobs_chunk_size: int | None = None,
        overlap: bool = False,
    ) -> None:
        super().__init__(max_loras_per_batch, device, logprobs_chunk_size)
        self.batch_invariant = batch_invariant
        self.overlap = overlap

    # ---- layers

    def forward_with_base(
        self,
        layer: Any,
        x: Tensor,
        base_fn: Callable[[], Tensor],
        lora_a: Tensor,
        lora_b: Tensor,
        output_offset: Tensor | None,
        offsets: Offsets | None,
        *,
        all_reduce: Callable[[Tensor], Tensor] | None = None,
        kind: str | None = None,
        pruned_batch_info: LoRABatchInfo | None = None,
    ) -> Tensor:
        """Run a base layer and add its adapters.

        Args:
            layer: the engine's layer; an embedding's ``vocab_size`` and ``new_embeddings_buffer``
                are read.
            x: ``[T, K]``, or ids ``[T]`` of an embedding.
            base_fn: computes the base output ``[T, N]``, which is written to.
            lora_a, lora_b: weights.
            output_offset: not read; ``offsets`` are the same on the host.
            offsets: first column of each slice and the end.
            all_reduce: of a row-parallel layer, whose A is sharded as its base weight is. It is
                called once, on base and adapters together, since B is linear.
            kind: "linear", "embedding" or "lm_head"; None: linear.
            pruned_batch_info: the rows of x, where they are not those of the batch.

        Returns:
            ``[T, N]``.
        """
        kind_name = "linear" if kind is None else str(getattr(kind, "value", kind))
        if kind_name not in ("linear", "embedding", "lm_head"):
            raise NotImplementedError(f"lora_ext's backend does not support layers of {kind_name}")
        if pruned_batch_info is None and self.batch_info is None:
            output = base_fn()
        elif kind_name == "embedding":
            output = base_fn()
            self._add_embedding(layer, output, x, lora_a, lora_b)
        else:
            site = self._site(x, lora_a, lora_b, offsets, None, pruned_batch_info)
            output = self._forward_linear(base_fn, site)
        return output if all_reduce is None else all_reduce(output)

    def run_qkv_lora(
        self,
        x: Tensor,
        qkv_lora_a: Tensor,
        qkv_lora_b: Tensor,
        output_offset: Tensor | None = None,
        output_offset_cpu: Offsets | None = None,
        max_qkv_out_dim: int | None = None,
        base_output: Tensor | None = None,
        n_slices: int = 3,
    ) -> Tensor:
        """``base_output += scaling * (x Aᵀ) Bᵀ`` for ``n_slices`` stacked projections.

        The slices' columns are the first ones of ``base_output`` and lie where
        ``output_offset_cpu`` says; ``output_offset`` serves only where it is on the host, and
        ``max_qkv_out_dim`` not at all.
        """
        offsets = output_offset if output_offset_cpu is None else output_offset_cpu
        site = self._site(x, qkv_lora_a, qkv_lora_b, offsets, n_slices, None)
        return self._add(base_output, site)

    def run_gate_up_lora(
        self,
        x: Tensor,
        gate_up_lora_a: Tensor,
        gate_up_lora_b: Tensor,
        output_offset: Tensor | None = None,
        output_offset_cpu: Offsets | None = None,
        base_output: Tensor | None = None,
    ) -> Tensor:
        """``run_qkv_lora`` for two slices; without offsets on the host they are of equal width."""
        offsets = output_offset if output_offset_cpu is None else output_offset_cpu
        if offsets is None or (isinstance(offsets, Tensor) and not offsets.is_cpu):
            width = gate_up_lora_b.shape[1]
            offsets = (0, width // 2, width)
        site = self._site(x, gate_up_lora_a, gate_up_lora_b, offsets, 2, None)
        return self._add(base_output, site)

    def run_lora_a_sgemm(
        self,
        x: Tensor,
        weights: Tensor,
        *,
        stack_num: int = 1,
        pruned_batch_info: LoRABatchInfo | None = None,
    ) -> Tensor:
        """``scaling * x Aᵀ`` in float32 ``[T, S * R]``.

        Slice i of a token whose slot has rank r lies in columns ``i * r`` to ``(i + 1) * r``, and
        zeros behind the last one; ``run_lora_b_sgemm`` takes it so.
        """
        return sgemm_lora_a_fwd(x, weights, self._info(pruned_batch_info, x), stack_num)

    def run_lora_b_sgemm(
        self,
        x: Tensor,
        weights: Tensor,
        output_offset: Tensor | None = None,
        output_offset_cpu: Offsets | None = None,
        base_output: Tensor | None = None,
        pruned_batch_info: LoRABatchInfo | None = None,
    ) -> Tensor:
        """``base_output += x Bᵀ`` for x ``[T, S * R]`` as ``run_lora_a_sgemm`` returns it.

        x of another dtype is converted. One slice needs no offsets, several need them on the host.
        """
        offsets = output_offset if output_offset_cpu is None else output_offset_cpu
        info = self._info(pruned_batch_info, x)
        return sgemm_lora_b_fwd(x, weights, info, offsets, base_output)

    def run_lora_a_embedding(
        self,
        input_ids: Tensor,
        weights: Tensor,
        vocab_size: int,
        extra_embeddings: Tensor | None = None,
    ) -> Tensor:
        """``scaling * A[:, id]`` in float32 ``[T, R]`` for A ``[L, R, >= vocab_size]``.

        Added tokens, ids from ``vocab_size`` on, find their values in A's further columns or in
        ``extra_embeddings [L, X, R]``; ids beyond every table give 0.
        """
        info = self._info(None, input_ids)
        return sgemm_lora_a_embedding_fwd(input_ids, weights, info, vocab_size, extra_embeddings)

    def run_extra_token_embedding(
        self, input_ids: Tensor, output: Tensor, extra_embeddings: Tensor, vocab_size: int
    ) -> Tensor:
        """Replace rows of ``output [T, D]`` by an adapter's own embeddings of added tokens.

        Args:
            input_ids: ``[T]``.
            output: changed in place where a token has an adapter and an id from ``vocab_size`` to
                ``vocab_size + X - 1``.
            extra_embeddings: ``[L, X, D]``.
            vocab_size: the first added id.

        Returns:
            ``output``.
        """
        info = self._info(None, input_ids)
        num_extra = extra_embeddings.shape[1]
        if num_extra == 0:
            return output
        slots = info.token_slots[: input_ids.numel()]
        slot = slots.clamp(min=0).long()
        index = input_ids.reshape(-1) - vocab_size
        replaced = (slots >= 0) & (info.lora_ranks[slot] > 0) & (index >= 0) & (index < num_extra)
        rows = extra_embeddings[slot, index.clamp(0, num_extra - 1).long()]
        output.copy_(torch.where(replaced[:, None], rows.to(output.dtype), output))
        return output

    def moe_hooks(
        self,
        gate_up: ExpertLoRA | None,
        down: ExpertLoRA | None,
        topk_ids: Tensor,
        *,
        num_experts: int,
        expert_map: Tensor | None = None,
    ) -> LoRAHooks:
        """Return what an MoE layer calls after its two projections, for the batch in force.

        The layer's routing is aligned here, in one launch; where nothing is to be added, which the
        host knows, both hooks are None.

        Args:
            gate_up, down: the layer's adapters; None: none are loaded.
            topk_ids: int32 or int64 ``[T, k]``, -1 for a choice that is not routed.
            num_experts: E, of the adapters' weights.
            expert_map: int32, a routed id's index among the E, or -1.

        Raises:
            RuntimeError: ``is_moe_lora`` was not set when the batch was prepared.
        """
        info = self.batch_info
        in_force = info is not None and (info.use_cuda_graph or info.has_active_lora)
        if info is None or not in_force or (gate_up is None and down is None):
            return LoRAHooks()
        if info.moe_lora_info is None:
            raise RuntimeError("the batch was prepared without MoE layers: set is_moe_lora first")
        routing = align_routing(
            topk_ids,
            info.moe_lora_info.token_lora_mapping,
            num_slots=self.max_loras_per_batch,
            num_experts=num_experts,
            expert_map=expert_map,
            buffers=self._moe_buffers(info),
        )
        return lora_hooks(gate_up, down, routing)

    # ---- what they share

    def _info(self, pruned: LoRABatchInfo | None, x: Tensor) -> LoRABatchInfo:
        """Return the info that x's rows belong to."""
        info = self.batch_info if pruned is None else pruned
        if info is None:
            raise RuntimeError("no batch is prepared: call prepare_lora_batch first")
        if not info.use_cuda_graph and x.shape[0] < info.expected_tokens:
            raise ValueError(
                f"x has {x.shape[0]} rows, the batch has {info.expected_tokens}: where rows are "
                "pruned, pass the info of those that are left (lm_head_batch_info)"
            )
        return info

    def _add(self, output: Tensor | None, site: Site) -> Tensor:
        """Add a layer's adapters to ``output``, or to zeros."""
        if output is None:
            output = site.lora_b.new_zeros((site.x.shape[0], sum(site.widths)))
        if site.is_active:
            site.add_to(output, batch_invariant=self.batch_invariant)
        return output

    def _forward_linear(self, base_fn: Callable[[], Tensor], site: Site) -> Tensor:
        """Run a base layer and add its adapters, the first half of that beside it in a graph, or if
        asked to."""
        if site.is_active and (self.overlap or site.info.use_cuda_graph):
            return site.run_beside(
                base_fn, batch_invariant=self.batch_invariant, overlap=self.overlap
            )
        return self._add(base_fn(), site)

    def _site(
        self,
        x: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        offsets: Offsets | None,
        num_slices: int | None,
        pruned: LoRABatchInfo | None,
    ) -> Site:
        """Look up what a layer adds to the rows of x."""
        info = self._info(pruned, x)
        max_rank = lora_b.shape[-1]
        if num_slices is None:
            num_slices = lora_a.shape[1] // max_rank if max_rank else 1
        widths = slice_widths(offsets, num_slices, lora_b)
        return Site(info, x.to(lora_b.dtype), lora_a, lora_b, widths)

    def _add_embedding(
        self, layer: Any, output: Tensor, ids: Tensor, lora_a: Tensor, lora_b: Tensor
    ) -> None:
        """Add an embedding's adapters, and put their own rows for added tokens in place."""
        info = self._info(None, ids)
        extra: Tensor | None = getattr(layer, "new_embeddings_buffer", None)
        rows = extra if extra is not None and extra.shape[-1] == lora_b.shape[1] else None
        extra_a = extra if rows is None else None
        if extra is not None:
            lora_a = lora_a[:, :, : layer.vocab_size]
        if lora_b.numel() and (info.use_cuda_graph or info.has_active_lora):
            ops.lora_embedding_apply_(
                output,
                ids,
                lora_a,
                lora_b,
                info.lora_ranks,
                info.scalings,
                info.plan,
                extra_a=extra_a,
            )
        if rows is not None:
            self.run_extra_token_embedding(ids, output, rows, layer.vocab_size)
