"""Options that ``lora-ext bench`` and the scripts in ``benchmarks/`` share; needs no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
OWN = "lora_ext"


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Declare where, with whom and how often problems are measured."""
    parser.add_argument("--device", help="cuda, cuda:N or cpu (default: cuda where usable)")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU"
    )
    parser.add_argument(
        "--providers", metavar="LIST", help=f"comma-separated; {OWN} always runs (default: all)"
    )
    parser.add_argument("--replays", type=int, default=11, help="times per provider (default: 11)")
    parser.add_argument("--only", metavar="REGEX", help="problems whose name matches")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there")
    parser.add_argument(
        "--bandwidth", type=float, metavar="TB/s", help="for the floor, in place of the device's"
    )
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import it first, such as one that makes an engine's kernels available",
    )
