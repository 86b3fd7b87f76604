"""``lora-ext bench``: how fast the operators are here, beside what else is installed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._command import EXIT_FAILED, EXIT_OK, CommandError, require, resolve_device

if TYPE_CHECKING:
    from ..benchmarking.case import Problem

SUMMARY = "time the operators on this machine, beside torch, PEFT and installed engines"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..benchmarking.options import add_run_options

    parser.add_argument("--model", default="llama-3-8b", help="whose shapes (default: llama-3-8b)")
    parser.add_argument("--site", default="qkv,down", help="layers (default: qkv,down)")
    parser.add_argument("--tokens", default="1,32,256", help="batch sizes (default: 1,32,256)")
    parser.add_argument("--adapters", default="1,32", help="adapters in a batch (default: 1,32)")
    parser.add_argument("--rank", default="16", help='ranks, or "mixed" (default: 16)')
    parser.add_argument(
        "--mix",
        default="even",
        choices=["even", "zipf", "segments"],
        help="how tokens share the adapters (default: even; segments: one run of tokens each)",
    )
    parser.add_argument("--grid", help="a list of problems instead, or several: see --list")
    parser.add_argument("--list", action="store_true", help="print models, sites and grids")
    add_run_options(parser)


def run(args: argparse.Namespace) -> int:
    require()
    import torch

    from ..benchmarking import grids, layer, report
    from ..benchmarking.command import run_problems
    from ..benchmarking.registry import MODELS

    if args.list:
        for model in MODELS.values():
            experts = f", {model.experts.num_experts} experts" if model.experts else ""
            print(f"model {model.name}: {', '.join(model.sites)}{experts}")
        print(f"grids: {', '.join([*grids.GRIDS, layer.GRID])}")
        return EXIT_OK
    device = torch.device(resolve_device(args.device))
    names = args.grid.split(",") if args.grid else []
    for name in names:
        if name not in grids.GRIDS and name != layer.GRID:
            raise CommandError(f"--grid {name}: expected {', '.join([*grids.GRIDS, layer.GRID])}")
    problems = [problem for name in names if name != layer.GRID for problem in grids.GRIDS[name]()]
    if not names:
        problems = chosen(args)
    status = EXIT_OK
    if problems and report.wrong(run_problems(problems, args, device, print)):
        status = EXIT_FAILED
    if layer.GRID in names:
        layer.run_layers(layer.layer_problems(args.model), args, device, print)
    return status


def chosen(args: argparse.Namespace) -> list[Problem]:
    """The problems that --model, --site, --tokens, --adapters, --rank and --mix describe."""
    from ..benchmarking.dense import DenseProblem
    from ..benchmarking.registry import MODELS
    from ..benchmarking.workload import make_workload

    if args.model not in MODELS:
        raise CommandError(f"--model {args.model}: expected one of {', '.join(MODELS)}")
    sites = MODELS[args.model].sites
    for site in args.site.split(","):
        if site not in sites:
            raise CommandError(f"--site {site}: {args.model} has {', '.join(sites)}")
    ranks = args.rank.split(",")
    for rank in ranks:
        if rank != "mixed":
            _positive("--rank", [rank])
    workloads = {
        str(workload): workload
        for tokens in _positive("--tokens", args.tokens.split(","))
        for rank in ranks
        for adapters in _positive("--adapters", args.adapters.split(","))
        for workload in [make_workload(tokens, min(adapters, tokens), rank, args.mix)]
    }
    return [
        DenseProblem(args.model, sites[site], workload)
        for site in args.site.split(",")
        for workload in workloads.values()
    ]


def _positive(option: str, texts: Sequence[str]) -> list[int]:
    values = [int(text) if text.isdecimal() else 0 for text in texts]
    if min(values) < 1:
        raise CommandError(f"{option} {','.join(texts)}: expected positive integers")
    return values
