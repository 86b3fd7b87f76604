"""What a problem is: sets of data that a provider works through, and the answer it must give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Unsupported(Exception):
    """A provider cannot do this problem, or is not installed; the message says why."""


@dataclass(frozen=True)
class Cost:
    """The least that must be moved and computed: bytes, and operations (a multiply-add is two)."""

    bytes: int
    operations: int


@dataclass(frozen=True)
class Candidate:
    """One provider, ready to work on ``num_sets`` sets of data.

    Attributes:
        run: does set i; this is timed.
        result: does set i from a fresh start and returns what it computed; this is checked.
        captured: whether it can be captured in a CUDA graph; else it is timed as it runs, eagerly.
    """

    run: Callable[[int], object]
    result: Callable[[int], Tensor]
    num_sets: int
    captured: bool = True


@dataclass(frozen=True)
class Case:
    """A problem set up on a device.

    Attributes:
        makers: by provider, what sets it up; raises `Unsupported`.
        error: relative error of a result of set i.
        tolerance: the error from which on a result is wrong.
    """

    makers: Mapping[str, Callable[[], Candidate]]
    error: Callable[[int, Tensor], float]
    tolerance: float
    num_sets: int


@dataclass(frozen=True)
class Setting:
    """Where and how much: the device, the dtype and how many sets of data to rotate over.

    ``sets_for(bytes touched per call, bytes of memory per set)``.
    """

    device: torch.device
    dtype: torch.dtype
    rotation_bytes: int
    memory_bytes: int
    max_sets: int

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> Setting:
        if device.type == "cuda":
            # Several times the L2 of any GPU.
            return cls(device, dtype, 256 << 20, 12 << 30, 512)
        return cls(device, dtype, 64 << 20, 1 << 30, 8)

    def sets_for(self, touched: int, memory: int) -> int:
        wanted = -(-self.rotation_bytes // max(touched, 1))
        return max(2, min(wanted, self.max_sets, self.memory_bytes // max(memory, 1)))

    @property
    def element_size(self) -> int:
        return self.dtype.itemsize

    @property
    def tolerance(self) -> float:
        """Relative Frobenius error that rounding of the intermediate and of y explains."""
        return {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(self.dtype, 1e-5)


class Problem(Protocol):
    """One line of a table."""

    @property
    def grid(self) -> str: ...

    @property
    def name(self) -> str: ...

    def cost(self, dtype: torch.dtype) -> Cost: ...

    def prepare(self, setting: Setting) -> Case: ...


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of ``expected``; inf where ``actual`` has NaN."""
    norm = float(expected.float().norm())
    difference = float((actual.float() - expected.float()).norm())
    if difference != difference:
        return float("inf")
    return difference / norm if norm else difference
