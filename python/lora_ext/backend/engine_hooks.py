"""build_lora_hooks: SGLang's hooks into its MoE runners, over lora_ext's operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..moe import ExpertLoRA, LoRAHooks, MoEBuffers, align_routing


class LoRAInfoLike(Protocol):
    """What is read of SGLang's LoRAInfo: a layer's adapters and the batch.

    A is ``[L, E or 1, S * R, K]`` with slices R rows apart, B ``[L, E or 1, N, R]`` with the
    scaling in it.
    """

    @property
    def gate_up_lora_a_weights(self) -> Tensor:
        """``[L, E or 1, 2 * R, H]``, or R rows where there is no gate."""

    @property
    def gate_up_lora_b_weights(self) -> Tensor:
        """``[L, E, 2 * I, R]``, or I rows."""

    @property
    def down_lora_a_weights(self) -> Tensor:
        """``[L, E, R, I]``."""

    @property
    def down_lora_b_weights(self) -> Tensor:
        """``[L, E or 1, H, R]``."""

    @property
    def lora_ranks(self) -> Tensor:
        """Rank of each slot: int32 ``[L]``."""

    @property
    def token_lora_mapping(self) -> Tensor:
        """Slot of each token: int32 ``[>= T]``, -1 for none."""

    @property
    def max_lora_rank(self) -> int:
        """R."""

    @property
    def num_experts(self) -> int:
        """E."""

    @property
    def has_active_lora(self) -> bool:
        """Whether the batch uses an adapter."""

    @property
    def cg_buffers(self) -> Mapping[str, Any] | None:
        """``moe_cg_buffers`` of the backend, in graphs."""


def build_lora_hooks(
    hidden_states: Tensor, lora_info: LoRAInfoLike | None, topk_ids: Tensor
) -> LoRAHooks:
    """Return what SGLang's MoE runners call after their two projections.

    To be put in place of ``sglang.srt.lora.lora_moe_runners.build_lora_hooks``. Slices of a wider
    cache (Marlin pads them) start at equal distances in it, and an x that is wider than A has
    padding behind.

    Args:
        hidden_states: x ``[T, H]``; not read here.
        lora_info: the layer's adapters; None: there are none.
        topk_ids: ``[T, k]``, -1 for a choice that is not routed.
    """
    if lora_info is None or lora_info.max_lora_rank == 0:
        return LoRAHooks()
    # A graph that is captured with a batch without adapters is replayed with others.
    if not lora_info.has_active_lora and not _is_capturing(topk_ids):
        return LoRAHooks()
    if getattr(lora_info, "fully_sharded", False):
        raise ValueError("lora_info.fully_sharded is set, expected B as the base weights are cut")
    ranks, max_rank = lora_info.lora_ranks, lora_info.max_lora_rank
    gate_up_a, gate_up_b = lora_info.gate_up_lora_a_weights, lora_info.gate_up_lora_b_weights
    down_a, down_b = lora_info.down_lora_a_weights, lora_info.down_lora_b_weights
    num_slices = gate_up_a.shape[2] // max_rank
    width = gate_up_b.shape[2] // num_slices
    scalings = torch.ones_like(ranks, dtype=torch.float32)
    in_graph: MoEBuffers | None = (lora_info.cg_buffers or {}).get("moe_buffers")
    routing = align_routing(
        topk_ids,
        lora_info.token_lora_mapping,
        num_slots=ranks.numel(),
        num_experts=lora_info.num_experts,
        buffers=in_graph if _is_capturing(topk_ids) else None,
    )

    def after_gate_up(x: Tensor, cache: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> None:
        pitch = cache.shape[-1] // num_slices
        adapters = ExpertLoRA(
            torch.split(gate_up_a, max_rank, dim=2),
            torch.split(gate_up_b, width, dim=2),
            ranks,
            scalings,
            [width] * num_slices,
            max_rank,
            [pitch * i for i in range(num_slices)],
        )
        adapters.add(x, cache, routing, topk_ids.shape[1], None)

    def after_down(x: Tensor, cache: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> None:
        widths = [down_b.shape[2]]
        adapters = ExpertLoRA([down_a], [down_b], ranks, scalings, widths, max_rank)
        x = x[:, : down_a.shape[-1]]
        adapters.add(x, cache, routing, topk_ids.shape[1], topk_weights)

    return LoRAHooks(after_gate_up, after_down)


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
