"""LoRABatch: which token of a batch uses which slot, as the plan that every layer shares."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import ops

Int32Array: TypeAlias = "npt.NDArray[np.int32]"
# Whole numbers on the host: one per request, or per token. Device tensors are passed beside it.
HostInts: TypeAlias = "Sequence[int] | npt.NDArray[Any]"

# Batches that the host may be ahead of the device before an update has to wait for a copy.
STAGING_BUFFERS = 8


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

    ``update`` refreshes it in place: from host sequences by one asynchronous copy and one launch,
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
        self._staging = _Staging(2 * self._layout.max_tokens + 1, self.device)
        self._submit(np.empty(0, np.int32), None)

    @classmethod
    def for_cuda_graph(
        cls, max_tokens: int, num_slots: int, device: torch.device | str = "cuda"
    ) -> LoRABatch:
        """Make the batch of one captured token bucket: a graph stays right for all its updates."""
        return cls(max_tokens, num_slots, device, static=True)

    def update(
        self,
        slots: HostInts | Tensor,
        seg_lens: HostInts | Tensor | None = None,
        seg_indptr: HostInts | Tensor | None = None,
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
        given = [value for value in (slots, seg_lens, seg_indptr) if value is not None]
        on_device = [isinstance(value, Tensor) and not value.is_cpu for value in given]
        if any(on_device):
            if not all(on_device):
                raise ValueError("slots and segments must be all on the host or all on the device")
            self._update_on_device(slots, seg_lens, seg_indptr)
            return
        slot_array = _host_ints("slots", slots)
        if seg_lens is None and seg_indptr is None:
            indptr, num_tokens = None, len(slot_array)
        else:
            indptr, num_tokens = _segments(len(slot_array), seg_lens, seg_indptr)
        if num_tokens > self.max_tokens:
            raise ValueError(f"the batch has {num_tokens} tokens, max_tokens is {self.max_tokens}")
        highest = -1
        if len(slot_array):
            highest = int(slot_array.max())
            if highest >= self.num_slots or slot_array.min() < -1:
                bad = int(np.flatnonzero((slot_array < -1) | (slot_array >= self.num_slots))[0])
                raise ValueError(
                    f"slots[{bad}] is {slot_array[bad]}, expected -1 to {self.num_slots - 1}"
                )
        self.num_requests = len(slot_array)
        if indptr is not None and len(slot_array) > self._layout.max_tokens:
            kept = np.flatnonzero(np.diff(indptr))  # more requests than tokens: some are empty
            slot_array, indptr = slot_array[kept], np.append(indptr[kept], indptr[-1])
        self._submit(slot_array, indptr)
        self.num_tokens = num_tokens
        self.has_active_lora = highest >= 0 and num_tokens > 0

    def _update_on_device(self, slots: Any, seg_lens: Any, seg_indptr: Any) -> None:
        ops.plan_batch_(self.plan, slots, seg_lens, seg_indptr, num_slots=self.num_slots)
        per_token = seg_lens is None and seg_indptr is None
        self.num_requests = slots.numel()
        self.num_tokens = slots.numel() if per_token else None
        self.has_active_lora = True

    def _submit(self, slots: Int32Array, indptr: Int32Array | None) -> None:
        """Copy checked host input to the device, in one piece, and launch the planner."""
        n = len(slots)
        size = n if indptr is None else 2 * n + 1
        buffer = self._staging.next()
        buffer.array[:n] = slots
        if indptr is not None:
            buffer.array[n:size] = indptr
        tensor = self._staging.copy(buffer, size)
        segments = None if indptr is None else tensor[n:size]
        ops.plan_batch_(self.plan, tensor[:n], None, segments, num_slots=self.num_slots)

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


class _Buffer:
    """Host memory of one update, and the copy that last read it."""

    def __init__(self, host: Tensor) -> None:
        self.host = host
        self.array: Int32Array = host.numpy()
        self.copied: torch.cuda.Event | None = None


class _Staging:
    """A ring of pinned buffers on the way to one device buffer; on the CPU, plain memory."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._on_gpu = device.type != "cpu"
        self._next = 0
        count = STAGING_BUFFERS if self._on_gpu else 1
        with torch.inference_mode(False):
            host = torch.empty((count, size), dtype=torch.int32, pin_memory=self._on_gpu)
            self._device = torch.empty(size, dtype=torch.int32, device=device)
        self._ring = [_Buffer(row) for row in host]

    def next(self) -> _Buffer:
        """Return a buffer that no copy reads any more; it waits only if all are on their way."""
        buffer = self._ring[self._next]
        self._next = (self._next + 1) % len(self._ring)
        if buffer.copied is not None and not buffer.copied.query():  # type: ignore[no-untyped-call]
            buffer.copied.synchronize()
        return buffer

    def copy(self, buffer: _Buffer, size: int) -> Tensor:
        """Return the first ``size`` elements as an int32 tensor on the device."""
        if not self._on_gpu:
            return buffer.host[:size]
        device = self._device[:size]
        device.copy_(buffer.host[:size], non_blocking=True)
        if buffer.copied is None:
            buffer.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        buffer.copied.record(torch.cuda.current_stream(device.device))
        return device


def _host_ints(name: str, values: HostInts | Tensor) -> Int32Array:
    """Return host input as a 1-D int32 array, without a Python loop over its elements."""
    try:
        if isinstance(values, Tensor):
            values = values.numpy()
        if not isinstance(values, np.ndarray):
            return np.frombuffer(array("i", values), np.int32)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{name} must hold whole numbers that fit int32: {error}") from error
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be 1-D and of an integer dtype, got {values.dtype} {values.shape}"
        )
    if values.dtype != np.int32 and len(values):
        low, high = int(values.min()), int(values.max())
        if low < -(2**31) or high >= 2**31:
            raise ValueError(f"{name} has values from {low} to {high}, which do not fit int32")
    return values.astype(np.int32, copy=False)


def _segments(
    num_requests: int, seg_lens: HostInts | Tensor | None, seg_indptr: HostInts | Tensor | None
) -> tuple[Int32Array, int]:
    """Return the checked ``seg_indptr [n + 1]`` and the number of tokens."""
    if seg_lens is not None:
        lens = _host_ints("seg_lens", seg_lens)
        if len(lens) != num_requests:
            raise ValueError(f"seg_lens has {len(lens)} entries, slots has {num_requests}")
        indptr = np.zeros(num_requests + 1, np.int64)
        np.cumsum(lens, out=indptr[1:])
    else:
        assert seg_indptr is not None
        indptr = _host_ints("seg_indptr", seg_indptr).astype(np.int64)
        if len(indptr) != num_requests + 1:
            raise ValueError(
                f"seg_indptr has {len(indptr)} entries, expected {num_requests + 1} for "
                f"{num_requests} slots"
            )
        if indptr[0] != 0:
            raise ValueError(f"seg_indptr must start at 0, got {indptr[0]}")
        lens = np.diff(indptr)
    if num_requests and lens.min() < 0:
        bad = int(np.flatnonzero(lens < 0)[0])
        raise ValueError(f"segment {bad} has {lens[bad]} tokens")
    num_tokens = int(indptr[-1])
    if num_tokens >= 2**31:
        raise ValueError(f"the batch has {num_tokens} tokens, which do not fit int32")
    return indptr.astype(np.int32), num_tokens
