"""The decode step of a Llama-3-8B-shaped model (random weights), captured in one CUDA graph.

Every linear layer has adapters. Columns: the step without LoRA in ms, and what each provider adds
to it in %: lora_ext after each GEMM, lora_linear (GEMM and adapters in one operator) where this
build has it, both for a batch in which nobody has an adapter (base_only, linear_only), torch's loop
and grouped GEMM and engines' kernels put into the same model, and PEFT's own layers ("peft" with
adapter_names, eager; "peft_one" with one adapter for all rows, captured).

Attention is simplified: all requests have --context tokens in a static cache, and torch's
scaled_dot_product_attention reads it. Norms and activations are torch's, unfused.
"""

from __future__ import annotations

import sys

import torch

from lora_ext.benchmarking import report
from lora_ext.benchmarking.command import device_of, script_parser, settings_of
from lora_ext.benchmarking.decoder import Decoder
from lora_ext.benchmarking.end_to_end import (
    BASE_ONLY,
    GRID,
    LINEAR_ONLY,
    NONE,
    Adapters,
    StepProblem,
    step_workloads,
)
from lora_ext.benchmarking.options import OWN
from lora_ext.benchmarking.providers import LoRALinear
from lora_ext.benchmarking.registry import MODELS
from lora_ext.benchmarking.runner import Row, measure


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--model", default="llama-3-8b", help="whose shape (default: llama-3-8b)")
    parser.add_argument("--layers", type=int, help="how many (default: the model's)")
    parser.add_argument(
        "--context", type=int, default=512, help="tokens per request (default: 512)"
    )
    parser.add_argument("--batch", default="1,16,64,256", help="default: 1,16,64,256")
    parser.add_argument("--adapters", default="1,8,32", help="default: 1,8,32")
    parser.add_argument("--rank", default="16,64", help="default: 16,64")
    parser.add_argument(
        "--peft-batch",
        type=int,
        default=16,
        help="largest batch that PEFT is timed on (default: 16)",
    )
    args = parser.parse_args()
    device = device_of(args)
    setting, limits = settings_of(args, device)
    where = report.machine(setting, limits)
    wanted = (
        {*args.providers.split(","), NONE, BASE_ONLY, LINEAR_ONLY, LoRALinear.name, OWN}
        if args.providers
        else None
    )
    model = MODELS[args.model]
    counts = [int(text) for text in args.adapters.split(",")]
    torch.manual_seed(0)
    decoder = Decoder.random(model, args.layers or model.num_layers, device, setting.dtype)
    print(f"{where['device']}, {where['dtype']}, {model.name}, {decoder.num_layers} layers")
    rows: list[Row] = []
    columns: list[str] = []
    for rank in args.rank.split(","):
        adapters = None
        for batch in map(int, args.batch.split(",")):
            decoder.start(batch, args.context)
            for workload in step_workloads(batch, counts, rank):
                adapters = adapters or Adapters(decoder, workload)
                problem = StepProblem(GRID, decoder, adapters, workload)
                names = wanted or set(problem.prepare(setting).makers)
                if batch > args.peft_batch:
                    names = {name for name in names if not name.startswith("peft")}
                row = measure(problem, setting, limits, providers=names, replays=args.replays)
                rows.append(row)
                if not columns:
                    columns = [name for name in row.providers if name != NONE]
                    titles = "".join(f" {name:>13}" for name in columns)
                    print(f"{'problem':<28} {'step ms':>8} {'floor':>6}{titles}")
                print(line(row, columns), flush=True)
                if args.json:
                    report.write(args.json, rows, where)
    for text in report.notes(rows):
        print(text)
    return 1 if report.wrong(rows) else 0


def line(row: Row, columns: list[str]) -> str:
    base = row.providers[NONE].us
    floor = "-" if row.floor_us is None else f"{row.floor_us / 1e3:.2f}"
    cells = [f"{row.name:<28} {'-' if base is None else f'{base / 1e3:.3f}':>8} {floor:>6}"]
    for name in columns:
        measured = row.providers.get(name)
        us = measured.us if measured else None
        cells.append(
            f"{'-' if us is None or base is None else f'{100 * (us / base - 1):+.1f}':>13}"
        )
    return " ".join(cells)


if __name__ == "__main__":
    sys.exit(main())
