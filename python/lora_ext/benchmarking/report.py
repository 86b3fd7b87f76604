"""The table of a run, and the JSON file with everything that is behind it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .case import Setting
from .floor import Limits
from .options import OWN
from .runner import Row

FORMAT = 1
_TIMES = "\N{MULTIPLICATION SIGN}"


def header(providers: Sequence[str]) -> str:
    """The title of the table; ``providers`` beside lora_ext get a column of µs each."""
    columns = f"{'problem':<34} {'µs':>8} {'GB/s':>7} {'% of floor':>10} {_TIMES + ' best':>7}"
    return columns + "".join(f" {name:>13}" for name in providers)


def line(row: Row, providers: Sequence[str]) -> str:
    """One problem: lora_ext's time, the bytes that must move over it, how much of that time the
    floor explains, and the time over the best other's (below 1: lora_ext is ahead)."""
    us = row.us
    cells = [f"{row.name:<34}", f"{_number(us):>8}"]
    cells.append(f"{_number(row.bytes / us / 1e3 if us else None):>7}")
    share = 100 * row.floor_us / us if us and row.floor_us else None
    cells.append(f"{_number(share):>10}")
    cells.append(f"{'-' if row.ratio is None else f'{row.ratio:.2f}':>7}")
    for name in providers:
        measured = row.providers.get(name)
        text = "" if measured is None else _number(measured.us)
        eager = measured is not None and measured.us is not None and not measured.captured
        cells.append(f"{text + ('e' if eager and row.floor_us else ''):>13}")
    return " ".join(cells)


def notes(rows: Iterable[Row]) -> list[str]:
    """Why a provider has no time, each reason once, with the first problem and how many."""
    seen: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, measured in row.providers.items():
            if measured.note:
                seen.setdefault((name, measured.note), []).append(row.name)
    lines = []
    for (name, note), problems in seen.items():
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        lines.append(f"{name}: {note} ({problems[0]}{more})")
    return lines


def summary(rows: Sequence[Row]) -> list[str]:
    """Per grid the geometric means over its problems."""
    lines = []
    for grid in dict.fromkeys(row.grid for row in rows):
        mine = [row for row in rows if row.grid == grid and row.us is not None]
        parts = [f"{grid}: {len(mine)} problems"]
        floors = [row.us / row.floor_us for row in mine if row.us and row.floor_us]
        ratios = [row.ratio for row in mine if row.ratio is not None]
        if floors:
            parts.append(f"{geometric_mean(floors):.2f} {_TIMES} the floor")
        if ratios:
            parts.append(f"{geometric_mean(ratios):.2f} {_TIMES} the best other's time")
            parts.append(f"slowest {max(ratios):.2f}")
        lines.append(", ".join(parts))
    return lines


def wrong(rows: Iterable[Row]) -> list[str]:
    """The problems that lora_ext itself got wrong."""
    return [row.name for row in rows if OWN in row.providers and row.providers[OWN].failed]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def machine(setting: Setting, limits: Limits | None) -> dict[str, Any]:
    """Where a run was made: device, versions, and the limits behind its floor."""
    from ..cli.collect_env import collect

    sections, _ = collect()
    cuda = setting.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(setting.device) if cuda else "cpu",
        "dtype": str(setting.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "limits": asdict(limits) if limits else None,
        "environment": {title: dict(rows) for title, rows in sections.items()},
    }


def write(path: Path, rows: Sequence[Row], where: dict[str, Any]) -> None:
    """Write a run as JSON: ``machine``, and ``rows`` with what each provider did."""
    data = {"format": FORMAT, "machine": where, "rows": [as_json(row) for row in rows]}
    path.write_text(json.dumps(data, indent=1) + "\n")


def as_json(row: Row) -> dict[str, Any]:
    best = row.best_other
    return {
        **asdict(row),
        "us": row.us,
        "best_other": best[0] if best else None,
        "ratio": row.ratio,
    }


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
