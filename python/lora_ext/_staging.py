"""Host memory on its way to the device: pinned, reused, copied without waiting."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows that are filled in turn. Each half of them has one event, recorded behind its last copy, so
# that an update waits only if the host is at least half of them ahead of the device.
STAGING_ROWS = 16
_HALF = STAGING_ROWS // 2


class Staging:
    """A ring of pinned rows on the way to one device buffer; on the CPU, one row of plain memory.

    Updates must be ordered on the device, on one stream or by events, as those of the plan are.

    Args:
        size: int32 elements.
        device: where the buffer is.

    Attributes:
        on_device: int32 ``[size]``; on the CPU it is the row itself.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._on_gpu = device.type != "cpu"
        with torch.inference_mode(False):
            rows = torch.zeros(
                (STAGING_ROWS if self._on_gpu else 1, size),
                dtype=torch.int32,
                pin_memory=self._on_gpu,
            )
            self._rows: list[Tensor] = list(rows)
            self.on_device: Tensor = self._rows[0]
            if self._on_gpu:
                self.on_device = torch.empty(size, dtype=torch.int32, device=device)
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._current = 0

    def row(self) -> Tensor:
        """Return the row to fill, which no copy reads any more: int32 ``[size]``, on the host."""
        if self._current % _HALF == 0:
            copied = self._copied[self._current // _HALF]
            if copied is not None and not copied.query():  # type: ignore[no-untyped-call]
                copied.synchronize()
        return self._rows[self._current]

    def send(self) -> None:
        """Queue a copy of the whole row to the device."""
        if self._on_gpu:
            self.on_device.copy_(self._rows[self._current], non_blocking=True)
            self.sent()

    def sent(self) -> None:
        """Go on to the next row: a copy of this one is queued on the current stream."""
        if not self._on_gpu:
            return
        half, rest = divmod(self._current, _HALF)
        if rest == _HALF - 1:
            event = self._copied[half]
            if event is None:
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._copied[half] = event
            event.record(torch.cuda.current_stream(self.on_device.device))
        self._current = (self._current + 1) % STAGING_ROWS
