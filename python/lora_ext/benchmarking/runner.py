"""Sets a problem up, checks every provider's result, and times those that are right."""

from __future__ import annotations

import gc
from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from .case import Candidate, Case, Problem, Setting, Unsupported
from .floor import Limits
from .options import OWN
from .timing import time_together


@dataclass(frozen=True)
class Measured:
    """What one provider did with one problem.

    ``us`` is None where it has no time and ``note`` says why: it ``failed``, or does not do this.
    """

    us: float | None = None
    best_us: float | None = None
    error: float | None = None
    captured: bool = False
    failed: bool = False
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One problem: what it costs at least, and what each provider took."""

    grid: str
    name: str
    bytes: int
    operations: int
    sets: int
    floor_us: float | None
    providers: dict[str, Measured] = field(default_factory=dict)

    @property
    def us(self) -> float | None:
        own = self.providers.get(OWN)
        return None if own is None else own.us

    @property
    def best_other(self) -> tuple[str, float] | None:
        """The fastest provider that is not this library."""
        times = [
            (measured.us, name)
            for name, measured in self.providers.items()
            if name != OWN and measured.us is not None
        ]
        if not times:
            return None
        us, name = min(times)
        return name, us

    @property
    def ratio(self) -> float | None:
        """This library's time over that of the best other: below 1 it is ahead."""
        if self.us is None or self.best_other is None:
            return None
        return self.us / self.best_other[1]


@torch.no_grad()
def measure(
    problem: Problem,
    setting: Setting,
    limits: Limits | None,
    *,
    providers: Collection[str] | None = None,
    replays: int = 11,
) -> Row:
    """Measure one problem; ``providers`` None: all there are.

    Raises:
        RuntimeError: the device is in a state after which nothing can be trusted.
    """
    torch.manual_seed(0)
    case = problem.prepare(setting)
    measured: dict[str, Measured] = {}
    candidates: dict[str, Candidate] = {}
    for name in case.makers:
        if providers is not None and name not in providers:
            continue
        measured[name], candidate = _check(case, name, setting.device)
        if candidate is not None:
            candidates[name] = candidate
    timings, failures = time_together(candidates, setting.device, replays)
    for name, timing in timings.items():
        error = measured[name].error
        measured[name] = Measured(timing.us, timing.best_us, error, timing.captured)
    for name, why in failures.items():
        measured[name] = Measured(error=measured[name].error, failed=True, note=why)
    cost = problem.cost(setting.dtype)
    row = Row(
        problem.grid,
        problem.name,
        cost.bytes,
        cost.operations,
        case.num_sets,
        limits.floor_us(cost) if limits else None,
        measured,
    )
    del case, candidates
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def _check(case: Case, name: str, device: torch.device) -> tuple[Measured, Candidate | None]:
    try:
        candidate = case.makers[name]()
        last = candidate.num_sets - 1
        error = max(case.error(i, candidate.result(i)) for i in sorted({0, last}))
    except Unsupported as why:
        return Measured(note=str(why)), None
    except Exception as failure:
        message = (str(failure).strip().splitlines() or [""])[-1]
        if device.type == "cuda" and ("CUDA error" in str(failure) or "illegal" in str(failure)):
            raise RuntimeError(f"{name}: {message}; nothing after it can be trusted") from failure
        note = f"{type(failure).__name__}: {message}"[:160]
        return Measured(failed=True, note=note), None
    if not error < case.tolerance:
        note = f"wrong: relative error {error:.1e}"
        return Measured(error=error, failed=True, note=note), None
    return Measured(error=error), candidate
