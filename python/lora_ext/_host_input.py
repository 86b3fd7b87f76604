"""Whole numbers that a caller has on the host: where they are, or refused by name."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# One per request, or per token.
HostSequence: TypeAlias = "Sequence[int] | npt.NDArray[Any] | Tensor"
_Int64Array: TypeAlias = "npt.NDArray[np.int64]"

_ITEM_BYTES = {torch.int32: 4, torch.int64: 8, np.dtype(np.int32): 4, np.dtype(np.int64): 8}
_MANY = 512  # from which on it pays to try bytes first


# Where whole numbers are, for a C function, and the bytes of each: 8 or 4, signed, or 1, unsigned.
# An address is good while the values live that it came from.
HostInts: TypeAlias = tuple[object, int]


@lru_cache(maxsize=256)
def _int32s(count: int) -> struct.Struct:
    return struct.Struct(f"{count}i")


def host_ints(name: str, values: HostSequence, count: int) -> HostInts:
    """Return where ``count`` whole numbers are, without a Python loop over them.

    Arrays and tensors of int32 and int64 stay where they are; lists are packed.

    Raises:
        ValueError: they are not ``count`` whole numbers that fit int32 (of arrays and tensors, what
            they hold is not looked at).
    """
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries, expected {count}")
    if isinstance(values, np.ndarray):
        item_bytes = _ITEM_BYTES.get(values.dtype)
        if item_bytes and values.ndim == 1 and values.flags.carray:
            return _address(values.data), item_bytes
    elif isinstance(values, Tensor):
        item_bytes = _ITEM_BYTES.get(values.dtype)
        if item_bytes and values.dim() == 1 and values.is_contiguous():
            return values.data_ptr(), item_bytes
    else:
        return _packed(name, values, count)
    return _address(_as_array(name, values).data), 8


def _address(values: memoryview | bytearray) -> object:
    # Keeps the values alive, and takes a quarter of the time of an array's `ctypes`.
    return ctypes.byref(ctypes.c_char.from_buffer(values)) if len(values) else None


def _packed(name: str, values: Sequence[int], count: int) -> HostInts:
    if count >= _MANY:
        # Python makes bytes of a list in a quarter of the time that it packs int32s.
        with suppress(ValueError, TypeError):  # of numbers beyond them, and of what is none
            return _address(bytearray(values)), 1  # bytes() takes three times as long
    try:
        return _int32s(count).pack(*values), 4
    except (TypeError, struct.error) as error:
        raise ValueError(f"{name} must hold whole numbers that fit int32: {error}") from error


def without_empty(
    slots: HostSequence, seg_lens: HostSequence | None, seg_indptr: HostSequence | None
) -> tuple[_Int64Array, _Int64Array]:
    """Return the slots and lengths of the requests that have tokens.

    Raises:
        ValueError: lengths that are negative, or as many as there are no slots.
    """
    slot_array = _as_array("slots", slots)
    lens = _lengths(len(slot_array), seg_lens, seg_indptr)
    kept = np.flatnonzero(lens)
    return slot_array[kept], lens[kept]


def refuse(
    slots: HostSequence,
    seg_lens: HostSequence | None,
    seg_indptr: HostSequence | None,
    num_slots: int,
    max_tokens: int,
) -> NoReturn:
    """Say what is wrong with a batch that the operator refused.

    Raises:
        ValueError: always.
    """
    num_tokens = len(slots)
    if seg_lens is not None or seg_indptr is not None:
        num_tokens = int(_lengths(num_tokens, seg_lens, seg_indptr).sum())
    check_room(num_tokens, max_tokens)
    check_slots(slots, num_slots)
    raise ValueError("the batch was refused")


def check_room(num_tokens: int, max_tokens: int) -> None:
    """Raise ValueError for more tokens than there is room for."""
    if num_tokens > max_tokens:
        raise ValueError(f"the batch has {num_tokens} tokens, max_tokens is {max_tokens}")


def check_slots(slots: HostSequence, num_slots: int) -> None:
    """Raise ValueError for a slot outside ``[-1, num_slots)``."""
    array = _as_array("slots", slots)
    bad = np.flatnonzero((array < -1) | (array >= num_slots))
    if len(bad):
        raise ValueError(f"slots[{bad[0]}] is {array[bad[0]]}, expected -1 to {num_slots - 1}")


def _lengths(
    num_requests: int, seg_lens: HostSequence | None, seg_indptr: HostSequence | None
) -> _Int64Array:
    """Return the checked length of each segment."""
    if seg_lens is not None:
        lens = _as_array("seg_lens", seg_lens)
    else:
        assert seg_indptr is not None
        indptr = _as_array("seg_indptr", seg_indptr)
        if len(indptr) == 0 or indptr[0] != 0:
            start = indptr[0] if len(indptr) else "nothing"
            raise ValueError(f"seg_indptr must start at 0, got {start}")
        lens = np.diff(indptr)
    if len(lens) != num_requests:
        raise ValueError(f"there are {len(lens)} segments for {num_requests} slots")
    if len(lens) and lens.min() < 0:
        bad = int(np.flatnonzero(lens < 0)[0])
        raise ValueError(f"segment {bad} has {lens[bad]} tokens")
    return lens


def _as_array(name: str, values: HostSequence) -> _Int64Array:
    array = np.asarray(values)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and len(array)):
        raise ValueError(
            f"{name} must be 1-D and of an integer dtype, got {array.dtype} {array.shape}"
        )
    if len(array) and (int(array.min()) < -(2**31) or int(array.max()) >= 2**31):
        raise ValueError(
            f"{name} has values from {array.min()} to {array.max()}, which do not fit int32"
        )
    return array.astype(np.int64)
