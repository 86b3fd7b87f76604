"""The floor: what a problem costs a device that does nothing but move its bytes once."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .case import Cost
from .timing import event_seconds

# One H200, measured: a kernel that reads little, in a chain of a graph; a copy of 1 GB, counting
# both directions; a product of two 8192 x 8192 bf16 matrices.
H200_LAUNCH_US = 1.1
H200_BYTES_PER_S = 4.2e12
H200_OPERATIONS_PER_S = 750e12


@dataclass(frozen=True)
class Limits:
    """What a device can do, and whether these are constants or were measured just now."""

    launch_us: float
    bytes_per_s: float
    operations_per_s: float
    source: str

    def floor_us(self, cost: Cost) -> float:
        """The launch and the bytes, or the operations where those take longer."""
        moving = self.launch_us + cost.bytes / self.bytes_per_s * 1e6
        return max(moving, cost.operations / self.operations_per_s * 1e6)


H200 = Limits(H200_LAUNCH_US, H200_BYTES_PER_S, H200_OPERATIONS_PER_S, "an H200's, measured before")


def limits_of(device: torch.device, bandwidth: float | None = None) -> Limits | None:
    """The limits of ``device``, None for a CPU; ``bandwidth`` in bytes/s in place of its own."""
    if device.type != "cuda":
        return None
    known = "H200" in torch.cuda.get_device_name(device)
    limits = H200 if known else _measure(device)
    if bandwidth is None:
        return limits
    return Limits(limits.launch_us, bandwidth, limits.operations_per_s, f"{limits.source}; given")


def _measure(device: torch.device) -> Limits:
    size = 1 << 30
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    copy_s = _median_seconds(lambda: target.copy_(source))
    product_s = _median_seconds(lambda: torch.mm(left, right, out=out))
    return Limits(H200_LAUNCH_US, 2 * size / copy_s, 2 * 8192**3 / product_s, "measured now")


def _median_seconds(run: Callable[[], object]) -> float:
    for _ in range(10):
        run()
    return statistics.median(event_seconds(run) for _ in range(9))
