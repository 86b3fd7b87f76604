"""Host memory of a batch on its way to the device: pinned, reused, copied without waiting."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Batches that the host may be ahead of the device before an update has to wait for a copy.
STAGING_BUFFERS = 8


class Buffer:
    """Host memory of one update, and the copy that last read it."""

    def __init__(self, host: Tensor) -> None:
        self.host = host
        self.array: npt.NDArray[np.int32] = host.numpy()
        self.copied: torch.cuda.Event | None = None


class Staging:
    """A ring of pinned buffers on the way to one device buffer; on the CPU, plain memory.

    A buffer holds ``n`` slots and, where there are segments, ``n + 1`` offsets behind them.
    """

    def __init__(self, max_requests: int, device: torch.device) -> None:
        self._on_gpu = device.type != "cpu"
        shape = (STAGING_BUFFERS if self._on_gpu else 1, 2 * max_requests + 1)
        with torch.inference_mode(False):
            host = torch.empty(shape, dtype=torch.int32, pin_memory=self._on_gpu)
            self._device = torch.empty(shape[1], dtype=torch.int32, device=device)
        self._ring = [Buffer(row) for row in host]
        if not self._on_gpu:
            self._device = host[0]
        self._next = 0
        self._view_key = (-1, False)
        self._views: tuple[Tensor, Tensor | None] = (self._device, None)

    def next(self) -> Buffer:
        """Return a buffer that no copy reads any more; it waits only if all are on their way."""
        buffer = self._ring[self._next]
        self._next = (self._next + 1) % len(self._ring)
        if buffer.copied is not None and not buffer.copied.query():  # type: ignore[no-untyped-call]
            buffer.copied.synchronize()
        return buffer

    def copy(self, buffer: Buffer, n: int, segmented: bool) -> tuple[Tensor, Tensor | None]:
        """Return the buffer's slots ``[n]`` and offsets ``[n + 1]`` as tensors on the device."""
        size = 2 * n + 1 if segmented else n
        if self._on_gpu:
            device = self._device[:size]
            device.copy_(buffer.host[:size], non_blocking=True)
            if buffer.copied is None:
                buffer.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            buffer.copied.record(torch.cuda.current_stream(device.device))
        if self._view_key != (n, segmented):  # most batches have as many requests as the last one
            self._view_key = (n, segmented)
            self._views = (self._device[:n], self._device[n:size] if segmented else None)
        return self._views
