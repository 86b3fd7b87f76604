"""Host memory of a batch on its way to the device: pinned, reused, copied without waiting."""

from __future__ import annotations

import struct

import numpy as np
import torch
from torch import Tensor

# Buffers that are filled in turn. Each half of them has one event, recorded behind its last copy,
# so an update waits only if the host is at least half of them ahead of the device.
STAGING_BUFFERS = 16
_HALF = STAGING_BUFFERS // 2


class Request:
    """Where a batch of ``n`` requests goes: views of one buffer, kept for batches of that size.

    Attributes:
        host: int32 ``[n]`` or ``[2 * n + 1]``, all of it: ``slots``, with segments ``indptr``.
        slots: int32 ``[n]``.
        indptr: int32 ``[n + 1]``, where there are segments.
        packer: packs ``n`` whole numbers of a list as int32.
    """

    def __init__(self, buffer: Tensor, n: int, segmented: bool) -> None:
        self.n = n
        self.segmented = segmented
        self.host = buffer[: 2 * n + 1 if segmented else n]
        array = self.host.numpy()
        self.slots = array[:n]
        self.indptr = array[n:]
        self.ends = self.indptr[1:]
        self.scratch = np.empty(n, np.int32)
        # As unsigned numbers, negative ones are larger than any bound: one maximum checks both.
        self.unsigned_scratch = self.scratch.view(np.uint32)
        self.unsigned_indptr = self.indptr.view(np.uint32)
        self.packer = struct.Struct(f"{n}i")


class Staging:
    """A ring of pinned buffers on the way to one device buffer; on the CPU, plain memory.

    Updates must be ordered on the device, on one stream or by events, as those of the plan are.
    """

    def __init__(self, max_requests: int, device: torch.device) -> None:
        self._on_gpu = device.type != "cpu"
        shape = (STAGING_BUFFERS if self._on_gpu else 1, 2 * max_requests + 1)
        with torch.inference_mode(False):
            host = torch.empty(shape, dtype=torch.int32, pin_memory=self._on_gpu)
            self._device = host[0]
            if self._on_gpu:
                self._device = torch.empty(shape[1], dtype=torch.int32, device=device)
        self._buffers = list(host)
        self._requests: list[Request | None] = [None] * len(self._buffers)
        self._on_device = self._device[:0]
        self._arguments: tuple[Tensor, Tensor | None] = (self._on_device, None)
        self._arguments_for = (0, False)
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._current = 0

    def request(self, n: int, segmented: bool) -> Request:
        """Return a buffer that no copy reads any more, as a place for ``n`` requests."""
        if self._current % _HALF == 0:
            copied = self._copied[self._current // _HALF]
            if copied is not None and not copied.query():  # type: ignore[no-untyped-call]
                copied.synchronize()
        request = self._requests[self._current]
        if request is None or request.n != n or request.segmented != segmented:
            request = Request(self._buffers[self._current], n, segmented)
            self._requests[self._current] = request
        return request

    def submit(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """Send the buffer in hand; returns slots ``[n]`` and offsets ``[n + 1]`` on the device."""
        n, segmented = request.n, request.segmented
        if self._arguments_for != (n, segmented):
            self._arguments_for = (n, segmented)
            self._on_device = self._device[: 2 * n + 1 if segmented else n]
            self._arguments = (self._device[:n], self._on_device[n:] if segmented else None)
        if self._on_gpu:
            self._on_device.copy_(request.host, non_blocking=True)
            self._advance()
        return self._arguments

    def _advance(self) -> None:
        half, rest = divmod(self._current, _HALF)
        if rest == _HALF - 1:
            event = self._copied[half]
            if event is None:
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._copied[half] = event
            event.record(torch.cuda.current_stream(self._device.device))
        self._current = (self._current + 1) % STAGING_BUFFERS
