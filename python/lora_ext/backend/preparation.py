"""The batches of LoRABackend: what an engine calls before each forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from ..moe import MoEBuffers
from .batch_info import LoRABatchInfo
from .forward import ForwardBatchLike, rows_of_lm_head, tokens_per_request


class BatchPreparation:
    """The batch in force, and the infos that hold it; ``LoRABackend`` says what is what."""

    FIRST_CAPACITY: ClassVar[int] = 1024  # tokens of an eager batch before its plan grows
    FIRST_PRUNED_CAPACITY: ClassVar[int] = 64
    lora_workspace: ClassVar[None] = None  # engines clear the one that other backends have

    def __init__(
        self,
        max_loras_per_batch: int,
        device: torch.device | str,
        logprobs_chunk_size: int | None,
    ) -> None:
        self.max_loras_per_batch = max_loras_per_batch
        self.device = torch.device(device)
        self.logprobs_chunk_size = logprobs_chunk_size
        self.is_moe_lora = False
        self.moe_cg_buffers: dict[str, Any] = {}
        self.prefill_moe_cg_buffers: dict[str, Any] | None = None
        self.batch_info: LoRABatchInfo | None = None
        self.lm_head_batch_info: LoRABatchInfo | None = None
        self.lm_head_pass_batch_infos: list[LoRABatchInfo] | None = None
        self._lm_head_pass_idx: int | None = None
        self.cuda_graph_batch_info: LoRABatchInfo | None = None
        self.prefill_cuda_graph_batch_info: LoRABatchInfo | None = None
        self.prefill_cuda_graph_max_bs: int | None = None
        self.prefill_cuda_graph_max_tokens: int | None = None
        self._eager = self._new_info(self.FIRST_CAPACITY, self.FIRST_CAPACITY, static=False)
        # One for the rows of lm_head, and one for each pass over them.
        self._pruned: list[LoRABatchInfo] = []

    def _new_info(self, max_tokens: int, max_requests: int, *, static: bool) -> LoRABatchInfo:
        return LoRABatchInfo(
            max_tokens, max_requests, self.max_loras_per_batch, self.device, use_cuda_graph=static
        )

    def init_decode_cuda_graph_batch_info(
        self, max_bs_in_cuda_graph: int, num_tokens_per_req: int
    ) -> None:
        """Make the static info of decode graphs, for ``bs * num_tokens_per_req`` tokens.

        To be called before capture, once: a graph reads the info that there was at its capture.
        Requests need not have equal numbers of tokens.
        """
        self.cuda_graph_batch_info = self._new_info(
            max_bs_in_cuda_graph * num_tokens_per_req, max_bs_in_cuda_graph, static=True
        )

    def init_prefill_cuda_graph_batch_info(
        self, max_num_tokens: int, max_num_requests: int | None = None
    ) -> None:
        """Make the static info of prefill graphs; before capture, once."""
        max_requests = max_num_tokens if max_num_requests is None else max_num_requests
        self.prefill_cuda_graph_batch_info = self._new_info(
            max_num_tokens, max_requests, static=True
        )
        self.prefill_cuda_graph_max_bs = max_requests
        self.prefill_cuda_graph_max_tokens = max_num_tokens

    def init_cuda_graph_moe_buffers(
        self,
        max_bs: int,
        max_loras: int,
        compute_dtype: torch.dtype,
        moe_layer: Any,
        *,
        prefill: bool = False,
    ) -> None:
        """Make what the MoE layers of captured graphs share.

        To be called before the engine measures its free memory, so before the static infos are
        made: ``MoEBuffers.nbytes_for`` says what it will take. ``moe_cg_buffers`` then has it.

        Args:
            max_bs: the most tokens of a captured batch.
            max_loras: L.
            compute_dtype: not read; what is allocated does not depend on it.
            moe_layer: one of the layers, whose ``base_layer`` has ``top_k`` and ``num_experts``.
            prefill: for the graphs of prefills; else for those of decoding.

        Raises:
            ValueError: ``max_loras`` is not that of the backend.
        """
        if max_loras != self.max_loras_per_batch:
            raise ValueError(
                f"max_loras is {max_loras}, the backend has {self.max_loras_per_batch} slots"
            )
        base = moe_layer.base_layer
        buffers = MoEBuffers(max_bs, base.top_k, base.num_experts, max_loras, self.device)
        if prefill:
            self.prefill_moe_cg_buffers = _engine_names(buffers)
        else:
            self.moe_cg_buffers = _engine_names(buffers)

    def resize_cuda_graph_moe_buffers(self, max_bs: int) -> bool:
        """Make the decode graphs' MoE buffers for another number of tokens; before capture.

        Returns:
            Whether they have changed.
        """
        buffers: MoEBuffers | None = self.moe_cg_buffers.get("moe_buffers")
        if buffers is None or not buffers.resize(max_bs):
            return False
        self.moe_cg_buffers = _engine_names(buffers)
        return True

    def _moe_buffers(self, info: LoRABatchInfo) -> MoEBuffers | None:
        """Return the MoE buffers of a static info's graphs."""
        if not info.use_cuda_graph:
            return None
        is_prefill = info is self.prefill_cuda_graph_batch_info
        named = self.prefill_moe_cg_buffers if is_prefill else self.moe_cg_buffers
        return named.get("moe_buffers") if named else None

    def _add_moe_lora_info(self, forward_batch: object, batch_info: LoRABatchInfo) -> LoRABatchInfo:
        """Fill ``batch_info.moe_lora_info`` if there are MoE layers, in place where graphs read it.

        Args:
            forward_batch: not read; the info knows its tokens.
            batch_info: updated and returned.
        """
        if self.is_moe_lora:
            batch_info.update_moe(self._moe_buffers(batch_info))
        return batch_info

    def prepare_lora_batch(
        self,
        forward_batch: ForwardBatchLike,
        weight_indices: Sequence[int],
        lora_ranks: Sequence[int],
        scalings: Sequence[float],
        use_decode_cuda_graph: bool,
        use_prefill_cuda_graph: bool = False,
    ) -> None:
        """Put a batch in force.

        Args:
            forward_batch: the kind of batch and the tokens of each request, known on the host; the
                lm_head's rows too, for a prefill.
            weight_indices: slot of each request, -1 for none.
            lora_ranks: rank of each slot, ``[L]``; 0: no adapter.
            scalings: scaling of each slot, ``[L]``.
            use_decode_cuda_graph: refresh the static info of decode graphs.
            use_prefill_cuda_graph: refresh the static info of prefill graphs.

        Raises:
            ValueError: numbers that do not fit; everything is as before.
            RuntimeError: the static info was not made.
        """
        info = self._eager
        if use_decode_cuda_graph:
            info = _initialised(self.cuda_graph_batch_info, "init_decode_cuda_graph_batch_info")
        elif use_prefill_cuda_graph:
            info = _initialised(
                self.prefill_cuda_graph_batch_info, "init_prefill_cuda_graph_batch_info"
            )
        if len(weight_indices) != forward_batch.batch_size:
            raise ValueError(
                f"got {len(weight_indices)} weight_indices for {forward_batch.batch_size} requests"
            )
        seg_lens = tokens_per_request(forward_batch)
        rows = rows_of_lm_head(forward_batch)
        self._install(info, weight_indices, seg_lens, lora_ranks, scalings)
        if rows is not None:
            self._prepare_lm_head(info, weight_indices, rows)

    def prepare_lora_token_segments(
        self,
        *,
        segment_lens: Sequence[int],
        weight_indices: Sequence[int],
        lora_ranks: Sequence[int],
        scalings: Sequence[float],
    ) -> None:
        """Put an eager batch of explicit segments in force; arguments as above."""
        self._install(self._eager, weight_indices, segment_lens, lora_ranks, scalings)

    def _install(
        self,
        info: LoRABatchInfo,
        weight_indices: Sequence[int],
        seg_lens: Sequence[int] | None,
        lora_ranks: Sequence[int],
        scalings: Sequence[float],
    ) -> None:
        info.table.check(lora_ranks, scalings)
        buffers = self._moe_buffers(info) if self.is_moe_lora else None
        if buffers is not None:
            num_tokens = len(weight_indices) if seg_lens is None else sum(seg_lens)
            if num_tokens > buffers.max_tokens:
                raise ValueError(
                    f"the batch has {num_tokens} tokens, the MoE buffers {buffers.max_tokens}"
                )
        info.update(weight_indices, seg_lens)
        info.table.write(lora_ranks, scalings)
        info.settle()
        self._add_moe_lora_info(None, info)
        self.reset_batch_state()
        self.batch_info = info

    def _prepare_lm_head(
        self, info: LoRABatchInfo, weight_indices: Sequence[int], rows: Sequence[int]
    ) -> None:
        """Make the infos of the rows that lm_head sees, in one pass or in several."""
        self.lm_head_batch_info = self._pruned_info(0, info, weight_indices, rows)
        size, total = self.logprobs_chunk_size, sum(rows)
        if size is None or total <= size:
            return
        slots = [slot for slot, n in zip(weight_indices, rows, strict=True) for _ in range(n)]
        self.lm_head_pass_batch_infos = [
            self._pruned_info(1 + start // size, info, slots[start : start + size], None)
            for start in range(0, total, size)
        ]

    def _pruned_info(
        self,
        index: int,
        info: LoRABatchInfo,
        weight_indices: Sequence[int],
        rows: Sequence[int] | None,
    ) -> LoRABatchInfo:
        """Refresh an eager info of some rows, with the ranks and scalings of the batch."""
        if index == len(self._pruned):
            capacity = self.FIRST_PRUNED_CAPACITY
            self._pruned.append(
                LoRABatchInfo(
                    capacity, capacity, self.max_loras_per_batch, self.device, table=info.table
                )
            )
        pruned = self._pruned[index]
        pruned.update(weight_indices, rows)
        pruned.table = info.table
        pruned.settle()
        pruned.is_prefill = True
        return pruned

    def reset_batch_state(self) -> None:
        """Forget the batch: until the next one is prepared, layers compute their base."""
        self.batch_info = None
        self.lm_head_batch_info = None
        self.lm_head_pass_batch_infos = None
        self._lm_head_pass_idx = None

    def get_batch_info(self, layout: object = None) -> LoRABatchInfo | None:
        """Return the batch info; all layouts of tokens are one, without DP attention."""
        return self.batch_info

    def prepare_global_lora_batch(self, forward_batch: object) -> None:
        """Refuse DP attention."""
        raise NotImplementedError("lora_ext's backend does not support DP attention")

    def reset_routing_cache(self) -> None:
        """Do nothing: plans are not cached beyond their batch."""


def _engine_names(buffers: MoEBuffers) -> dict[str, Any]:
    """MoE buffers under the names by which SGLang's layers know them, and as they are."""
    return {
        "adapter_enabled": buffers.enabled,
        "token_lora_mapping": buffers.token_slots,
        "moe_buffers": buffers,
    }


def _initialised(info: LoRABatchInfo | None, method: str) -> LoRABatchInfo:
    if info is None:
        raise RuntimeError(f"the static batch info was not made: call {method} first")
    return info
