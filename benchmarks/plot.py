"""Draws results as an SVG: per grid, speedup over the best other and distance from the floor.

Reads the JSON of the benchmarks and `lora-ext bench --json`, or the CSV files in results/; a dot is
a problem, a bar the geometric mean.

    python benchmarks/plot.py benchmarks/results/h200_2026-11-22.csv --output docs/speed.svg
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

OWN, OTHER, BEHIND, INK, FAINT = "#2f7ed8", "#8a8f98", "#c2571a", "#22262b", "#d9dce1"
WIDTH, LEFT, PANEL, GAP, TOP, ROW, FOOT = 900, 110, 310, 85, 92, 74, 46
GRID_ORDER = ("decode", "prefill", "embed", "moe", "plan", "shrink", "expand")
TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Point:
    """One problem, times in µs; ``other`` is that of the best other provider."""

    grid: str
    us: float
    other: float | None
    floor: float | None


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis over a panel that starts at ``x``."""

    x: float
    low: float
    high: float

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.x + PANEL * min(max(share, 0.0), 1.0)

    @property
    def ticks(self) -> list[float]:
        first, last = math.ceil(math.log2(self.low)), math.floor(math.log2(self.high))
        return [2.0**power for power in range(first, last + 1)]


def read(path: Path) -> list[Point]:
    """The problems of a results file that lora_ext has a time for."""
    if path.suffix == ".csv":
        with path.open() as file:
            return [
                Point(
                    row["grid"],
                    float(row["lora_ext_us"]),
                    _number(row["best_peer_us"]),
                    _number(row["floor_us"]),
                )
                for row in csv.DictReader(file)
                if row["lora_ext_us"]
            ]
    points = []
    for row in json.loads(path.read_text())["rows"]:
        if row["us"] is not None:
            other = row["providers"][row["best_other"]]["us"] if row["best_other"] else None
            points.append(Point(row["grid"], row["us"], other, row["floor_us"]))
    return points


def draw(points: Sequence[Point], caption: str) -> str:
    """The picture as SVG text."""
    present = {point.grid for point in points}
    grids = [grid for grid in GRID_ORDER if grid in present]
    grids += sorted(present - set(grids))
    speedups = [p.other / p.us for p in points if p.other]
    floors = [us / p.floor for p in points if p.floor for us in (p.us, p.other) if us]
    left = Axis(LEFT, *_range(speedups, 0.5, 2.0))
    right = Axis(LEFT + PANEL + GAP, *_range(floors, 1.0, 4.0))
    bottom = TOP + ROW * len(grids)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + FOOT}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="14" fill="{INK}">',
        "<title>Speed of lora_ext beside the best other kernels and the floor</title>",
        f'<rect width="{WIDTH}" height="{bottom + FOOT}" rx="10" fill="#ffffff"/>',
        _text(left.x, 30, "how many times as fast as the best other", weight="bold"),
        _text(right.x, 30, "how many times the floor it takes", weight="bold"),
        f'<circle cx="{right.x + 6}" cy="48" r="4" fill="{OWN}"/>',
        _text(right.x + 16, 53, "lora_ext", color=OWN),
        f'<circle cx="{right.x + 96}" cy="48" r="4" fill="{OTHER}"/>',
        _text(right.x + 106, 53, "best other", color=OTHER),
        *_axis(left, bottom),
        *_axis(right, bottom),
    ]
    for number, grid in enumerate(grids):
        mine = [point for point in points if point.grid == grid]
        middle = TOP + ROW * (number + 0.5)
        parts.append(_text(20, middle - 3, grid, weight="bold"))
        parts.append(_text(20, middle + 15, f"{len(mine)} problems", size=11, color=OTHER))
        ratios = [p.other / p.us for p in mine if p.other]
        parts += _strip(left, middle, ratios, None)
        own = [p.us / p.floor for p in mine if p.floor]
        others = [p.other / p.floor for p in mine if p.floor and p.other]
        parts += _strip(right, middle - 15, own, OWN)
        parts += _strip(right, middle + 17, others, OTHER)
    parts.append(_text(20, bottom + FOOT - 10, caption, size=11, color=OTHER))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _axis(axis: Axis, bottom: float) -> list[str]:
    parts = []
    for tick in axis.ticks:
        x, color = axis.at(tick), INK if tick == 1 else FAINT
        parts.append(f'<path d="M{x:.1f} {TOP - 8}V{bottom}" stroke="{color}"/>')
        parts.append(_text(x, TOP - 14, f"{tick:g}{TIMES}", size=11, anchor="middle"))
    return parts


def _strip(axis: Axis, middle: float, values: Sequence[float], color: str | None) -> list[str]:
    """Dots for ``values`` and a bar at their geometric mean; no colour: by side of 1."""
    if not values:
        return []
    parts = []
    for i, value in enumerate(sorted(values)):
        # Neighbours keep apart: dots cycle over five heights.
        y = middle + (i * 2 % 5 - 2) * 4
        fill = color or (OWN if value >= 1 else BEHIND)
        parts.append(
            f'<circle cx="{axis.at(value):.1f}" cy="{y:.1f}" r="3" fill="{fill}" opacity="0.45"/>'
        )
    mean = math.exp(sum(map(math.log, values)) / len(values))
    fill, x = color or (OWN if mean >= 1 else BEHIND), axis.at(mean)
    parts.append(
        f'<rect x="{x - 1.5:.1f}" y="{middle - 13:.1f}" width="3" height="26" fill="{fill}"/>'
    )
    end = axis.x + PANEL + 8
    parts.append(_text(end, middle + 5, f"{mean:.2f}{TIMES}", weight="bold", color=fill))
    return parts


def _range(values: Sequence[float], low: float, high: float) -> tuple[float, float]:
    """Powers of two around ``values`` and around [low, high]."""
    low, high = min([*values, low]), max([*values, high])
    return 2.0 ** math.floor(math.log2(low)), 2.0 ** math.ceil(math.log2(high))


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 14,
    weight: str = "normal",
    color: str = INK,
    anchor: str = "start",
) -> str:
    style = f'font-size="{size}" font-weight="{weight}" fill="{color}" text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _number(text: str) -> float | None:
    return float(text) if text else None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="JSON or CSV files")
    parser.add_argument("--output", type=Path, required=True, help="the SVG file")
    parser.add_argument("--caption", default="", help="machine and versions, below the picture")
    args = parser.parse_args()
    points = [point for path in args.results for point in read(path)]
    if not points:
        print("no problem with a time in these files", file=sys.stderr)
        return 1
    args.output.write_text(draw(points, args.caption))
    return 0


if __name__ == "__main__":
    sys.exit(main())
