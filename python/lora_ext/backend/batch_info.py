"""LoRABatchInfo: a LoRABatch under SGLang's field names, with its slots' ranks and scalings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .._staging import Staging
from ..batch import LoRABatch
from ..moe import MoEBuffers


class MoELoRABatchInfo(NamedTuple):
    """The routing of MoE layers.

    Attributes:
        seg_indptr: int32 ``[n + 1]``, first token of each merged segment.
        req_to_lora: int32 ``[n]``, slot of each merged segment, -1 for none.
        adapter_enabled: int32 ``[L]``, 1 where a token has the slot and its rank is not 0.
        token_lora_mapping: int32 ``[M]``, slot of each token; -1: none, rank 0, or padding.
    """

    seg_indptr: Tensor
    req_to_lora: Tensor
    adapter_enabled: Tensor
    token_lora_mapping: Tensor


class SlotTable:
    """Rank and scaling of each slot, at fixed addresses on the device, refreshed by one copy.

    Attributes:
        lora_ranks: int32 ``[L]``; 0: no adapter.
        scalings: fp32 ``[L]``.
        active: slots whose rank is not 0.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._num_slots = num_slots
        self._staging = Staging(2 * num_slots, device)
        self._ranks = [0] * num_slots
        self._scalings: list[float] = [0.0] * num_slots
        self.active: frozenset[int] = frozenset()
        values = self._staging.on_device
        self.lora_ranks = values[:num_slots]
        self.scalings = values[num_slots:].view(torch.float32)
        self._submit()

    def check(self, ranks: Sequence[int], scalings: Sequence[float]) -> None:
        """Raise ValueError for what ``write`` must not get."""
        if len(ranks) != self._num_slots or len(scalings) != self._num_slots:
            raise ValueError(
                f"got {len(ranks)} lora_ranks and {len(scalings)} scalings, expected one of each "
                f"for {self._num_slots} slots"
            )
        if min(ranks) < 0 or max(ranks) > ops.MAX_RANK:
            raise ValueError(f"lora_ranks must be from 0 to {ops.MAX_RANK}, got {list(ranks)}")

    def write(self, ranks: Sequence[int], scalings: Sequence[float]) -> None:
        """Put checked values in force, on the current stream; nothing happens for equal ones."""
        new_ranks, new_scalings = list(ranks), list(scalings)
        if new_ranks == self._ranks and new_scalings == self._scalings:
            return
        self._ranks, self._scalings = new_ranks, new_scalings
        self.active = frozenset(slot for slot, rank in enumerate(new_ranks) if rank > 0)
        self._submit()

    def _submit(self) -> None:
        scalings = np.asarray(self._scalings, np.float32)
        row = self._staging.row().numpy()
        row[: self._num_slots] = self._ranks
        row[self._num_slots :] = scalings.view(np.int32)
        self._staging.send()


class LoRABatchInfo:
    """What the layers of one forward pass read, under the names that SGLang gives it.

    The tensors are views of the plan: segments are merged, so that neighbours of one slot count
    once, and what lies behind the last one is empty (slot -1, no tokens). With ``use_cuda_graph``
    everything keeps its address, so that captured kernels follow each update; the host numbers
    ``bs``, ``num_segments`` and ``max_len`` are then capacities, which stay valid for a kernel that
    was captured with them. Otherwise the plan may move to a larger buffer, and an info is right
    until the next one of its kind is prepared.

    Args:
        max_tokens: the most tokens; without ``use_cuda_graph`` the plan grows where more come.
        max_requests: the most requests of a static info.
        num_slots: L.
        device: where the layers run.
        use_cuda_graph: whether captured graphs read this.
        table: ranks and scalings to share; None: its own.

    Attributes:
        batch: the LoRABatch with the plan.
        bs: requests, or ``max_requests``.
        expected_tokens: tokens of the batch, without padding.
        has_active_lora: whether some token has a slot whose rank is not 0; may be assigned.
        is_prefill: free for the engine.
        moe_lora_info: the routing of MoE layers, where the backend prepares it.
    """

    def __init__(
        self,
        max_tokens: int,
        max_requests: int,
        num_slots: int,
        device: torch.device,
        *,
        use_cuda_graph: bool = False,
        table: SlotTable | None = None,
    ) -> None:
        self.use_cuda_graph = use_cuda_graph
        self.max_requests = max_requests
        self.table = table if table is not None else SlotTable(num_slots, device)
        self.bs = max_requests if use_cuda_graph else 0
        self.expected_tokens = 0
        self.has_active_lora = False
        self.is_prefill = False
        self.moe_lora_info: MoELoRABatchInfo | None = None
        self._moe: tuple[Tensor, Tensor] | None = None
        self._weight_indices: Sequence[int] = ()
        self._seg_lens: Sequence[int] | None = None
        self.batch = LoRABatch(max_tokens, num_slots, device, static=use_cuda_graph)

    def update(self, weight_indices: Sequence[int], seg_lens: Sequence[int] | None) -> None:
        """Put another batch in: a slot for each request, and its tokens (None: one each).

        Raises:
            ValueError: as ``LoRABatch.update``, or more requests than ``max_requests``; everything
                is as before.
        """
        num_requests = len(weight_indices)
        if self.use_cuda_graph and num_requests > self.max_requests:
            raise ValueError(
                f"the batch has {num_requests} requests, the graph's batch info {self.max_requests}"
            )
        batch = self.batch
        if not self.use_cuda_graph:
            batch = self._batch_for(
                num_requests if seg_lens is None else max(num_requests, sum(seg_lens))
            )
        batch.update(weight_indices, seg_lens=seg_lens)
        if batch is not self.batch:
            self.batch, self._moe = batch, None
        if not self.use_cuda_graph:
            self.bs = num_requests
        self.expected_tokens = batch.num_tokens or 0
        self._weight_indices = tuple(weight_indices)
        self._seg_lens = None if seg_lens is None else tuple(seg_lens)
        self.moe_lora_info = None

    def settle(self) -> None:
        """Say whether an adapter is in use, once both the batch and the table are in force."""
        uses = not self.table.active.isdisjoint(self._weight_indices)
        self.has_active_lora = uses and self.batch.has_active_lora

    def update_moe(self, buffers: MoEBuffers | None) -> None:
        """Refresh the routing of MoE layers, in place.

        Args:
            buffers: where it goes; None: to memory of its own.
        """
        batch = self.batch
        if buffers is not None:
            token_slots, enabled = buffers.token_slots, buffers.enabled
        else:
            if self._moe is None:
                with torch.inference_mode(False):
                    empty = torch.empty_like
                    self._moe = empty(batch.token_slots), empty(self.lora_ranks)
            token_slots, enabled = self._moe
        segments = min(len(self._weight_indices), token_slots.numel())
        seg_indptr = batch.seg_indptr[: segments + 1]
        seg_slots = batch.weight_indices[:segments]
        ops.moe_lora_info_(token_slots, enabled, seg_indptr, seg_slots, self.lora_ranks)
        self.moe_lora_info = MoELoRABatchInfo(seg_indptr, seg_slots, enabled, token_slots)

    def _batch_for(self, num_tokens: int) -> LoRABatch:
        """Return the batch, or one that is large enough."""
        batch = self.batch
        if num_tokens <= batch.max_tokens:
            return batch
        return LoRABatch(max(num_tokens, 2 * batch.max_tokens), batch.num_slots, batch.device)

    def _run_lengths(self) -> list[int]:
        """Tokens of each merged segment, from what the host knows."""
        lens = self._seg_lens if self._seg_lens is not None else [1] * len(self._weight_indices)
        pairs = [(w, n) for w, n in zip(self._weight_indices, lens, strict=True) if n]
        return [sum(n for _, n in run) for _, run in groupby(pairs, key=lambda pair: pair[0])]

    # ---- SGLang's fields

    @property
    def plan(self) -> Tensor:
        """The plan, as the operators take it: int32 ``[plan_size]``."""
        return self.batch.plan

    @property
    def lora_ranks(self) -> Tensor:
        """Rank of each slot: int32 ``[L]``."""
        return self.table.lora_ranks

    @property
    def scalings(self) -> Tensor:
        """Scaling of each slot: fp32 ``[L]``."""
        return self.table.scalings

    @property
    def num_segments(self) -> int:
        """Merged segments; of a static info the most there can be."""
        return self.max_requests if self.use_cuda_graph else len(self._run_lengths())

    @property
    def max_len(self) -> int:
        """Tokens of the longest merged segment; of a static info the most there can be."""
        if self.use_cuda_graph:
            return self.batch.max_tokens
        return max(self._run_lengths(), default=0)

    @property
    def seg_indptr(self) -> Tensor:
        """First token of each merged segment: int32 ``[M + 1]``."""
        return self.batch.seg_indptr

    @property
    def seg_lens(self) -> Tensor:
        """Tokens of each merged segment: int32 ``[M]``, 0 behind the last; computed on access."""
        return self.batch.seg_lens

    @property
    def weight_indices(self) -> Tensor:
        """Slot of each merged segment: int32 ``[M]``, -1 for none."""
        return self.batch.weight_indices

    @property
    def permutation(self) -> None:
        """None, which means that segments lie in the order of the tokens.

        The plan's own grouping by slot is ``batch.permutation`` with ``batch.slot_indptr``.
        """
        return None

    @property
    def token_slots(self) -> Tensor:
        """Slot of each token, -1 for none and for padding: int32 ``[M]``."""
        return self.batch.token_slots
