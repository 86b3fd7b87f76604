"""lora_apply_, over the decode and prefill grids on a GPU.

On a CPU: mixed decode batches of Llama-3-8B's sites, beside the per-adapter torch loop in turn; for
fp32 and bf16 run it twice with --dtype.
"""

from __future__ import annotations

import argparse
import sys

from lora_ext.benchmarking import grids, report
from lora_ext.benchmarking.command import device_of, run_problems, script_parser
from lora_ext.benchmarking.options import OWN


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--grid", choices=["decode", "prefill"], help="one of them (default: both)")
    args: argparse.Namespace = parser.parse_args()
    device = device_of(args)
    if device.type == "cpu" and not args.grid:
        problems = grids.cpu_decode()
        args.providers = args.providers or f"{OWN},torch_loop"
    else:
        names = [args.grid] if args.grid else ["decode", "prefill"]
        problems = [problem for name in names for problem in grids.GRIDS[name]()]
    return 1 if report.wrong(run_problems(problems, args, device, print)) else 0


if __name__ == "__main__":
    sys.exit(main())
