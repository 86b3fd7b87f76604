"""LoRABatch: which token of a batch uses which slot, as the plan that every layer shares."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import ops
from ._staging import Request, Staging

Int32Array: TypeAlias = "npt.NDArray[np.int32]"
# Whole numbers on the host: one per request, or per token. Device tensors are passed beside it.
HostInts: TypeAlias = "Sequence[int] | npt.NDArray[Any]"


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
        self._staging = Staging(self._layout.max_tokens, self.device)
        self._submit(self._staging.request(0, False))

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
        segments = seg_lens if seg_lens is not None else seg_indptr
        if _on_device(slots) or _on_device(segments):
            if not _on_device(slots) or not (segments is None or _on_device(segments)):
                raise ValueError("slots and segments must be all on the host or all on the device")
            self._update_on_device(slots, seg_lens, seg_indptr)
            return
        n = len(slots)
        if n > self._layout.max_tokens:
            slots, seg_lens = self._without_empty(slots, seg_lens, seg_indptr)
            seg_indptr = None
        request = self._staging.request(len(slots), segments is not None)
        _fill("slots", slots, request.slots, request)
        num_tokens = request.n
        if seg_lens is not None:
            num_tokens = self._scan_lens(seg_lens, request)
        elif seg_indptr is not None:
            num_tokens = self._check_indptr(seg_indptr, request)
        self._check_room(num_tokens)
        has_slot = self._check_slots(request)
        self._submit(request)
        self.num_requests = n
        self.num_tokens = num_tokens
        self.has_active_lora = has_slot and num_tokens > 0

    def _update_on_device(self, slots: Any, seg_lens: Any, seg_indptr: Any) -> None:
        ops.plan_batch_(self.plan, slots, seg_lens, seg_indptr, num_slots=self.num_slots)
        per_token = seg_lens is None and seg_indptr is None
        self.num_requests = slots.numel()
        self.num_tokens = slots.numel() if per_token else None
        self.has_active_lora = True

    def _submit(self, request: Request) -> None:
        """Copy checked host input to the device, in one piece, and launch the planner."""
        slots, indptr = self._staging.submit(request)
        ops.plan_batch_(self.plan, slots, None, indptr, num_slots=self.num_slots)

    def _check_slots(self, request: Request) -> bool:
        """Whether some slot is >= 0; raises for one outside ``[-1, num_slots)``."""
        if request.n == 0:
            return False
        np.add(request.slots, 1, out=request.scratch)
        highest = int(request.unsigned_scratch.max())
        if highest > self.num_slots:
            _check_range(request.slots, self.num_slots)
        return highest > 0

    def _check_room(self, num_tokens: int) -> None:
        if num_tokens > self.max_tokens:
            raise ValueError(f"the batch has {num_tokens} tokens, max_tokens is {self.max_tokens}")

    def _scan_lens(self, seg_lens: HostInts | Tensor, request: Request) -> int:
        """Turn checked lengths into the request's indptr; returns the number of tokens."""
        lens = request.scratch
        _fill("seg_lens", seg_lens, lens, request)
        request.indptr[0] = 0
        if request.n == 0:
            return 0
        if int(request.unsigned_scratch.max()) * request.n >= 2**31:  # perhaps too many for int32
            _check_lens(lens)
            self._check_room(int(lens.sum(dtype=np.int64)))
        np.add.accumulate(lens, out=request.ends)
        return int(request.ends[-1])

    def _check_indptr(self, seg_indptr: HostInts | Tensor, request: Request) -> int:
        """Check the request's indptr; returns the number of tokens."""
        indptr = request.indptr
        _fill("seg_indptr", seg_indptr, indptr, request)
        if indptr[0] != 0:
            raise ValueError(f"seg_indptr must start at 0, got {indptr[0]}")
        if request.n and int(request.unsigned_indptr.max()) > self.max_tokens:
            _check_lens(np.diff(indptr.astype(np.int64)))
            self._check_room(int(indptr[-1]))
        np.subtract(indptr[1:], indptr[:-1], out=request.scratch)
        _check_lens(request.scratch)
        return int(indptr[-1])

    def _without_empty(
        self,
        slots: HostInts | Tensor,
        seg_lens: HostInts | Tensor | None,
        seg_indptr: HostInts | Tensor | None,
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Drop requests without tokens from a batch that has more requests than room for tokens."""
        if seg_lens is None and seg_indptr is None:
            self._check_room(len(slots))
        slot_array = _as_array("slots", slots)
        if seg_lens is not None:
            lens = _as_array("seg_lens", seg_lens)
        else:
            assert seg_indptr is not None
            lens = np.diff(_as_array("seg_indptr", seg_indptr), prepend=0)
            if len(lens) == 0 or lens[0] != 0:
                raise ValueError("seg_indptr must start at 0")
            lens = lens[1:]
        if len(lens) != len(slot_array):
            raise ValueError(f"there are {len(lens)} segments for {len(slot_array)} slots")
        _check_range(slot_array, self.num_slots)
        _check_lens(lens)
        self._check_room(int(lens.sum()))
        kept = np.flatnonzero(lens)
        return slot_array[kept], lens[kept]

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


def _check_range(slots: npt.NDArray[Any], num_slots: int) -> None:
    bad = np.flatnonzero((slots < -1) | (slots >= num_slots))
    if len(bad):
        raise ValueError(f"slots[{bad[0]}] is {slots[bad[0]]}, expected -1 to {num_slots - 1}")


def _check_lens(lens: npt.NDArray[Any]) -> None:
    if len(lens) and lens.min() < 0:
        bad = int(np.flatnonzero(lens < 0)[0])
        raise ValueError(f"segment {bad} has {lens[bad]} tokens")


def _fill(name: str, values: HostInts | Tensor, out: Int32Array, request: Request) -> None:
    """Write host input into ``out`` as int32, without a Python loop over its elements."""
    if len(values) != len(out):
        raise ValueError(
            f"{name} has {len(values)} entries, expected {len(out)} for {request.n} slots"
        )
    if isinstance(values, Tensor):
        values = values.numpy()
    if isinstance(values, np.ndarray):
        if values.ndim != 1 or values.dtype != np.int32:
            _check_array(name, values)
        out[:] = values
        return
    packer = request.packer if len(out) == request.n else struct.Struct(f"{len(out)}i")
    try:
        packer.pack_into(out.data, 0, *values)
    except (TypeError, struct.error) as error:
        raise ValueError(f"{name} must hold whole numbers that fit int32: {error}") from error


def _as_array(name: str, values: HostInts | Tensor) -> npt.NDArray[Any]:
    """Return host input as a 1-D int64 array."""
    array = np.asarray(values)
    _check_array(name, array)
    return array.astype(np.int64)


def _check_array(name: str, values: npt.NDArray[Any]) -> None:
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be 1-D and of an integer dtype, got {values.dtype} {values.shape}"
        )
    if len(values) and (int(values.min()) < -(2**31) or int(values.max()) >= 2**31):
        raise ValueError(
            f"{name} has values from {values.min()} to {values.max()}, which do not fit int32"
        )
