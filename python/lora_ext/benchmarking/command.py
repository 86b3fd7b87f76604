"""A run of problems, as ``lora-ext bench`` and the scripts in ``benchmarks/`` make it."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import report
from .case import Problem, Setting
from .floor import Limits, limits_of
from .options import DTYPES, OWN, add_run_options
from .runner import Row, measure


def run_problems(
    problems: Sequence[Problem],
    args: argparse.Namespace,
    device: torch.device,
    emit: Callable[[str], Any],
) -> list[Row]:
    """Measure ``problems`` under the options of `add_run_options`; each line goes to ``emit``."""
    setting, limits = settings_of(args, device)
    wanted = set(args.providers.split(",")) | {OWN} if args.providers else None
    if args.only:
        problems = [problem for problem in problems if re.search(args.only, problem.name)]
    where = report.machine(setting, limits)
    emit(f"{where['device']}, {where['dtype']}, torch {torch.__version__}")
    if limits:
        emit(
            f"floor: {limits.launch_us} µs + bytes / {limits.bytes_per_s / 1e12:.2f} TB/s, or "
            f"operations / {limits.operations_per_s / 1e12:.0f} T/s ({limits.source}); "
            "e: timed eagerly"
        )
    rows: list[Row] = []
    grid, columns = "", []
    for problem in problems:
        row = measure(problem, setting, limits, providers=wanted, replays=args.replays)
        rows.append(row)
        if problem.grid != grid:
            grid = problem.grid
            columns = [name for name in row.providers if name != OWN]
            emit(f"\n{grid}\n{report.header(columns)}")
        emit(report.line(row, columns))
        if args.json:
            report.write(args.json, rows, where)
    for text in ("", *report.summary(rows), *report.notes(rows)):
        emit(text)
    return rows


def settings_of(args: argparse.Namespace, device: torch.device) -> tuple[Setting, Limits | None]:
    """The setting and the limits of a device under the options; imports what ``--import`` names."""
    for module in args.imports:
        importlib.import_module(module)
    name = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    setting = Setting.of(device, getattr(torch, DTYPES[name]))
    return setting, limits_of(device, args.bandwidth * 1e12 if args.bandwidth else None)


def script_parser(description: str) -> argparse.ArgumentParser:
    """The parser of a script in ``benchmarks/``, from its docstring."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_options(parser)
    return parser


def device_of(args: argparse.Namespace) -> torch.device:
    from ..cli._command import resolve_device

    return torch.device(resolve_device(args.device))


def main(description: str, problems: Sequence[Problem]) -> int:
    """Run a script in ``benchmarks/``; returns 1 where lora_ext got something wrong."""
    args = script_parser(description).parse_args()
    rows = run_problems(problems, args, device_of(args), emit=_print)
    return 1 if report.wrong(rows) else 0


def _print(text: str) -> None:
    print(text, flush=True)
