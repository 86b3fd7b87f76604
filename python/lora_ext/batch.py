"""LoRABatch: which token of a batch uses which slot, as the plan that every layer shares."""

from __future__ import annotations

from ctypes import c_char_p, c_int, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _library, ops
from ._host_input import HostSequence, check_room, check_slots, host_ints, refuse, without_empty
from ._staging import PinnedRows

# csrc/ops/update_plan.cpp has what they take.
_update_plan = _library.function(
    "lora_ext_update_plan",
    *(c_int64, c_void_p, c_int64, c_int64, c_int64, c_int, c_void_p, c_int64),
    *(c_void_p, c_int, c_void_p, c_int, c_int),
)
_last_error = _library.function("lora_ext_last_error", c_char_p)


class PlanLayout(NamedTuple):
    """Offsets of the plan's sections in int32 units: ``csrc/common/plan.h``, field for field."""

    max_tokens: int
    num_slots: int
    tiles: int
    wide_tiles: int
    token_slots: int
    permutation: int
    seg_indptr: int
    seg_slots: int
    slot_indptr: int
    enabled: int
    size: int

    @classmethod
    def of(cls, max_tokens: int, num_slots: int) -> PlanLayout:
        """Lay out a plan for ``max_tokens`` (a multiple of 64) tokens and ``num_slots`` slots."""
        tiles = 16
        wide_tiles = tiles + 4 * (max_tokens // 16 + num_slots)
        token_slots = wide_tiles + 4 * (max_tokens // 64 + num_slots)
        permutation = token_slots + max_tokens
        seg_indptr = permutation + max_tokens
        seg_slots = seg_indptr + max_tokens + 4
        slot_indptr = seg_slots + max_tokens
        enabled = slot_indptr + num_slots + 1
        size = enabled + num_slots + 3
        return cls(
            max_tokens,
            num_slots,
            tiles,
            wide_tiles,
            token_slots,
            permutation,
            seg_indptr,
            seg_slots,
            slot_indptr,
            enabled,
            size,
        )


class LoRABatch:
    """The plan of a batch, in a buffer of fixed address that every layer reads.

    ``update`` refreshes it in place: from host sequences by one launch that reads pinned memory,
    without waiting for the device; from int32 tensors on the device by the launch alone. Before the
    first update the plan is that of a batch without tokens.

    Args:
        max_tokens: the most tokens that a batch can have.
        num_slots: L, the slots of the adapter pool.
        device: where the layers run.

    Attributes:
        plan: int32 ``[plan_size(max_tokens, num_slots)]``, what the ops take.
        num_tokens: tokens of the batch; None where only the device knows (segments given there).
        num_requests: entries of ``slots`` in the last update.
        has_active_lora: whether some token has a slot >= 0; True where only the device knows.
        static: captured graphs read the plan, so no layer may be skipped for what it holds now.
    """

    def __init__(
        self,
        max_tokens: int,
        num_slots: int,
        device: torch.device | str = "cpu",
        *,
        static: bool = False,
    ) -> None:
        if max_tokens < 0 or num_slots < 1:
            raise ValueError(
                f"expected max_tokens >= 0 and num_slots >= 1, got {max_tokens} and {num_slots}"
            )
        self.max_tokens = max_tokens
        self.num_slots = num_slots
        self.static = static
        self.num_tokens: int | None = 0
        self.num_requests = 0
        self.has_active_lora = False
        with torch.inference_mode(False):
            self.plan = torch.zeros(
                ops.plan_size(max_tokens, num_slots), dtype=torch.int32, device=device
            )
        self.device = self.plan.device
        self._layout = PlanLayout.of(ops.round_up_tokens(max_tokens), num_slots)
        self._device_index = -1 if self.device.type == "cpu" else self.device.index
        self._rows = PinnedRows(2 * self._layout.max_tokens + 1, self.device)
        self.update([])

    @classmethod
    def for_cuda_graph(
        cls, max_tokens: int, num_slots: int, device: torch.device | str = "cuda"
    ) -> LoRABatch:
        """Make the batch of one captured token bucket: a graph stays right for all its updates."""
        return cls(max_tokens, num_slots, device, static=True)

    def update(
        self,
        slots: HostSequence,
        seg_lens: HostSequence | None = None,
        seg_indptr: HostSequence | None = None,
    ) -> None:
        """Put another batch into the plan.

        Args:
            slots: slot per request where ``seg_lens`` or ``seg_indptr`` is given, else per token;
                -1: no adapter. Lists, arrays and CPU tensors of whole numbers are host input;
                int32 tensors on ``device`` are used where they are.
            seg_lens: tokens per request, ``[n]``.
            seg_indptr: first token of each request and the number of tokens, ``[n + 1]``.

        Raises:
            ValueError: lengths that do not match, a slot outside ``[-1, num_slots)``, a negative
                length or more than ``max_tokens`` tokens; the plan is as before. What is on the
                device is not read here: the op clamps it.
        """
        if seg_lens is not None and seg_indptr is not None:
            raise ValueError("give seg_lens or seg_indptr, not both")
        segments = seg_lens if seg_lens is not None else seg_indptr
        if _on_device(slots) or _on_device(segments):
            if not _on_device(slots) or not (segments is None or _on_device(segments)):
                raise ValueError("slots and segments must be all on the host or all on the device")
            self._update_on_device(slots, seg_lens, seg_indptr)
            return
        self._update_from_host(slots, seg_lens, seg_indptr)

    def _update_from_host(
        self, slots: HostSequence, seg_lens: HostSequence | None, seg_indptr: HostSequence | None
    ) -> None:
        """Check, convert and plan in one call; the host's time counts here."""
        num_requests = n = len(slots)
        if n > self._layout.max_tokens:
            if seg_lens is None and seg_indptr is None:
                check_room(n, self.max_tokens)
            check_slots(slots, self.num_slots)
            slots, seg_lens = without_empty(slots, seg_lens, seg_indptr)
            seg_indptr = None
            n = len(slots)
            check_room(n, self.max_tokens)
        segments, segment_bytes = None, 0
        if seg_lens is not None:
            segments, segment_bytes = host_ints("seg_lens", seg_lens, n)
        elif seg_indptr is not None:
            segments, segment_bytes = host_ints("seg_indptr", seg_indptr, n + 1)
        planned = _update_plan(
            self.plan.data_ptr(),
            self._layout.max_tokens,
            self.num_slots,
            self.max_tokens,
            self._device_index,
            self._rows.row().data_ptr(),
            n,
            *host_ints("slots", slots, n),
            segments,
            segment_bytes,
            seg_lens is not None,
        )
        if planned == -1:
            refuse(slots, seg_lens, seg_indptr, self.num_slots, self.max_tokens)
        if planned < 0:
            raise RuntimeError(_last_error().decode())
        self._rows.queued()
        torch.autograd.graph.increment_version(self.plan)  # as ops.plan_batch_ does
        self.num_requests = num_requests
        self.num_tokens = planned // 2
        self.has_active_lora = planned % 2 == 1

    def _update_on_device(self, slots: Any, seg_lens: Any, seg_indptr: Any) -> None:
        ops.plan_batch_(self.plan, slots, seg_lens, seg_indptr, num_slots=self.num_slots)
        per_token = seg_lens is None and seg_indptr is None
        self.num_requests = slots.numel()
        self.num_tokens = slots.numel() if per_token else None
        self.has_active_lora = True

    # ---- what the plan holds: views of it, of fixed address

    def _view(self, start: int, length: int) -> Tensor:
        return self.plan[start : start + length]

    @property
    def num_segments(self) -> Tensor:
        """Merged segments: int32 ``[]``; runs of consecutive tokens of one slot, -1 included."""
        return self.plan[1]

    @property
    def num_active_slots(self) -> Tensor:
        """Distinct slots >= 0 in the batch: int32 ``[]``."""
        return self.plan[2]

    @property
    def num_lora_tokens(self) -> Tensor:
        """Tokens with a slot >= 0: int32 ``[]``."""
        return self.plan[3]

    @property
    def token_slots(self) -> Tensor:
        """Slot of each token, -1 for none and for padding: int32 ``[M]``."""
        return self._view(self._layout.token_slots, self._layout.max_tokens)

    @property
    def permutation(self) -> Tensor:
        """Token numbers grouped by slot, -1 behind ``num_lora_tokens``: int32 ``[M]``."""
        return self._view(self._layout.permutation, self._layout.max_tokens)

    @property
    def seg_indptr(self) -> Tensor:
        """First token of each merged segment: int32 ``[M + 1]``, ``num_segments + 1`` valid."""
        return self._view(self._layout.seg_indptr, self._layout.max_tokens + 1)

    @property
    def seg_lens(self) -> Tensor:
        """Tokens of each merged segment: int32 ``[M]``, ``num_segments`` valid; a new tensor."""
        indptr = self.seg_indptr
        return indptr[1:] - indptr[:-1]

    @property
    def weight_indices(self) -> Tensor:
        """Slot of each merged segment: int32 ``[M]``, ``num_segments`` valid."""
        return self._view(self._layout.seg_slots, self._layout.max_tokens)

    @property
    def slot_indptr(self) -> Tensor:
        """Where each slot's tokens start in the permutation: int32 ``[L + 1]``."""
        return self._view(self._layout.slot_indptr, self.num_slots + 1)

    @property
    def enabled(self) -> Tensor:
        """1 where the batch uses the slot: int32 ``[L]``."""
        return self._view(self._layout.enabled, self.num_slots)


def _on_device(values: object) -> bool:
    return isinstance(values, Tensor) and not values.is_cpu
