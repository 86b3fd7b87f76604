"""Host memory on its way to the device: pinned, reused, read without waiting."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows that are filled in turn. Each half of them has one event, recorded behind what reads its last
# row, so that an update waits only if the host is at least half of them ahead of the device.
STAGING_ROWS = 16
_HALF = STAGING_ROWS // 2
_NOT_READ = -1  # no stream's number


# Rows that nobody fills any more, and device and stream where something may still be going to read
# them: torch gives pinned memory away as soon as its tensor is gone, and knows of its own copies
# only. They are let go of when other rows are made, behind an event.
_retired: list[tuple[list[Tensor], torch.device, int]] = []
_leaving: list[tuple[list[Tensor], torch.cuda.Event]] = []


def _release_read_rows() -> None:
    if torch.cuda.is_current_stream_capturing():
        return
    while _retired:
        rows, device, number = _retired.pop()
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(_stream(number, device))
        _leaving.append((rows, event))
    _leaving[:] = [entry for entry in _leaving if not entry[1].query()]  # type: ignore[no-untyped-call]


def _stream(number: int, device: torch.device) -> torch.cuda.Stream:
    if number == 0:
        return torch.cuda.default_stream(device)
    return torch.cuda.ExternalStream(number, device=device)  # type: ignore[no-untyped-call]


class PinnedRows:
    """A ring of pinned rows that a device reads; for the CPU, one row of plain memory.

    What reads them must be ordered on the device, on one stream or by events, as updates of a plan
    are.

    Args:
        size: int32 elements.
        device: what reads them.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type != "cpu"
        self._device_index = -1
        self._stream = _NOT_READ  # of what reads them
        if self._on_gpu:
            self._device_index = (
                torch.cuda.current_device() if device.index is None else device.index
            )
            _release_read_rows()
        with torch.inference_mode(False):
            rows = torch.zeros(
                (STAGING_ROWS if self._on_gpu else 1, size),
                dtype=torch.int32,
                pin_memory=self._on_gpu,
            )
            self._rows: list[Tensor] = list(rows)
        self._read: list[torch.cuda.Event | None] = [None, None]
        self._current = 0

    def row(self) -> Tensor:
        """Return the row to fill, which nothing reads any more: int32 ``[size]``, on the host."""
        if self._current % _HALF == 0:
            read = self._read[self._current // _HALF]
            if read is not None and not read.query():  # type: ignore[no-untyped-call]
                read.synchronize()
        return self._rows[self._current]

    def queued(self) -> None:
        """Go on to the next row: what reads this one is queued on the current stream."""
        if not self._on_gpu:
            return
        # Its number alone: a torch.cuda.Stream each time would cost a microsecond.
        self._stream = torch._C._cuda_getCurrentRawStream(self._device_index)
        half, rest = divmod(self._current, _HALF)
        if rest == _HALF - 1:
            event = self._read[half]
            if event is None:
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._read[half] = event
            event.record(torch.cuda.current_stream(self._device))
        self._current = (self._current + 1) % STAGING_ROWS

    def __del__(self) -> None:
        if self._stream != _NOT_READ:
            _retired.append((self._rows, self._device, self._stream))


class Staging(PinnedRows):
    """Pinned rows on the way to one device buffer.

    Attributes:
        on_device: int32 ``[size]``; on the CPU it is the row itself.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__(size, device)
        self.on_device: Tensor = self._rows[0]
        if self._on_gpu:
            with torch.inference_mode(False):
                self.on_device = torch.empty(size, dtype=torch.int32, device=device)

    def send(self) -> None:
        """Queue a copy of the whole row to the device."""
        if self._on_gpu:
            self.on_device.copy_(self._rows[self._current], non_blocking=True)
            self.queued()
