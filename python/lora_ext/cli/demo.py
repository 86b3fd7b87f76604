"""``lora-ext demo``: one batch, another adapter in every row, each row compared with PEFT."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._command import (
    EXIT_FAILED,
    EXIT_OK,
    CommandError,
    positive_int,
    quiet_transformers,
    require,
    resolve_device,
)

if TYPE_CHECKING:
    from peft import PeftModel

    from ._demo_check import Row, Verdict
    from ._demo_model import DemoModel

SUMMARY = "train three small adapters, run them in one mixed batch, and compare it with PEFT"
DTYPES = ("float32", "bfloat16", "float16")
BASE_STEPS, ADAPTER_STEPS = 200, 300

PROMPTS = (
    ("The old", None),
    ("The old", "recipes"),
    ("The old", "sea_log"),
    ("The old", "night_sky"),
    ("In the morning", "sea_log"),
    ("At last the", "recipes"),
    ("A good hour between clouds", "night_sky"),
    ("The lion", None),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--moe", action="store_true", help="a mixture of experts, adapted too; float32 only"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument(
        "--tokens", type=positive_int, default=24, help="new tokens per row (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep model, adapters and prompts in this folder"
    )


def run(args: argparse.Namespace) -> int:
    require("transformers", "peft")
    device = resolve_device(args.device)
    if args.tokens > 256:
        raise CommandError(f"--tokens {args.tokens}: the demo's model takes at most 256")
    if args.moe and args.dtype != "float32":
        raise CommandError(
            f"--moe --dtype {args.dtype}: in half precision, rounding sends tokens to other "
            "experts, so that logits cannot be compared"
        )
    if args.keep is None:
        with tempfile.TemporaryDirectory(prefix="lora-ext-demo-") as directory:
            return run_demo(Path(directory), device=device, **settings(args))
    if args.keep.exists() and (not args.keep.is_dir() or any(args.keep.iterdir())):
        raise CommandError(f"--keep {args.keep}: exists and is not an empty folder")
    status = run_demo(args.keep, device=device, **settings(args))
    command = ["lora-ext", "generate", "--model", f"{args.keep / 'model'}"]
    for path in adapter_paths(args.keep):
        command += ["--adapter", f"{path.name}={path}"]
    command += ["--input", f"{args.keep / 'prompts.jsonl'}", "--output", "out.jsonl"]
    print(f"\nkept in {args.keep}; run the batch again with\n  {shlex.join(command)}")
    return status


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "moe": args.moe,
        "dtype": args.dtype,
        "tokens": args.tokens,
        "seed": args.seed,
        "base_steps": BASE_STEPS,
        "adapter_steps": ADAPTER_STEPS,
    }


def adapter_paths(directory: Path) -> list[Path]:
    return sorted(path.parent for path in directory.glob("adapters/*/adapter_config.json"))


def run_demo(
    directory: Path,
    *,
    moe: bool,
    device: str,
    dtype: str,
    tokens: int,
    seed: int,
    base_steps: int,
    adapter_steps: int,
) -> int:
    """Do everything in ``directory``; returns 0 where every row agrees with PEFT, else 1."""
    quiet_transformers()
    peft_model, tokenizer = prepare(
        directory, moe=moe, seed=seed, base_steps=base_steps, adapter_steps=adapter_steps
    )
    return check(
        directory, peft_model, tokenizer, moe=moe, device=device, dtype=dtype, tokens=tokens
    )


def model_of(moe: bool) -> DemoModel:
    from . import _demo_model

    return _demo_model.MOE if moe else _demo_model.DENSE


def prepare(
    directory: Path,
    *,
    moe: bool = False,
    seed: int = 0,
    base_steps: int,
    adapter_steps: int,
) -> tuple[PeftModel, Any]:
    """Train the model and the adapters on the CPU, in float32, and save them in ``directory``.

    Returns:
        The PEFT model that holds all adapters, and the tokenizer.
    """
    from . import _demo_model

    def report(name: str, detail: str, loss: float) -> None:
        print(f"  {name:<10} {detail:<50} loss {loss:.2f}  {time.perf_counter() - start:5.1f} s")

    print("training (CPU, float32)")
    start = time.perf_counter()
    kind = model_of(moe)
    base, tokenizer, loss = _demo_model.train_base(
        kind, directory / "model", seed=seed, steps=base_steps
    )
    report("base", f"{kind.family}, {base.num_parameters() / 1e6:.1f} M parameters", loss)
    model: Any = base
    for spec in kind.adapters:
        start = time.perf_counter()
        model, loss = _demo_model.add_adapter(model, tokenizer, spec, steps=adapter_steps)
        report(spec.name, spec.detail, loss)
    _demo_model.save_adapters(model, directory / "adapters")
    with (directory / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for prompt, adapter in PROMPTS:
            file.write(json.dumps({"prompt": prompt, "adapter": adapter}) + "\n")
    return model, tokenizer


def check(
    directory: Path,
    peft_model: PeftModel,
    tokenizer: Any,
    *,
    moe: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    tokens: int = 24,
) -> int:
    """Load what was saved with lora_ext, generate one batch, and compare it with ``peft_model``."""
    import torch
    from transformers import AutoModelForCausalLM

    import lora_ext

    from . import _demo_check

    torch_dtype: torch.dtype = getattr(torch, dtype)
    ranks = model_of(moe).ranks
    base: Any = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch_dtype)
    model = lora_ext.wrap(base.to(device), max_adapters=len(ranks), max_rank=max(ranks.values()))
    for name in ranks:
        model.load_adapter(name, directory / "adapters" / name)

    peft_model.to(device).eval()
    _demo_check.round_parameters(peft_model, torch_dtype, compute=torch.float32)

    rows = [_demo_check.Row(prompt, adapter) for prompt, adapter in PROMPTS]
    inputs = tokenizer([row.prompt for row in rows], return_tensors="pt", padding=True).to(device)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    adapters = [row.adapter for row in rows]
    options = {"attention_mask": mask, "max_new_tokens": tokens, "do_sample": False}

    print(f"\none batch of {len(rows)} rows ({device}, {dtype}); then PEFT row by row (float32)")
    output = model.generate(
        ids, adapters=adapters, return_dict_in_generate=True, output_logits=True, **options
    )
    end = int(tokenizer.eos_token_id)
    generated = _demo_check.split_rows(output, ids.shape[1], end)
    verdicts = []
    for row, result in zip(rows, generated, strict=True):
        prompt = tokenizer(row.prompt, return_tensors="pt")["input_ids"].to(device)
        verdicts.append(
            _demo_check.compare(
                result,
                _demo_check.peft_alone(peft_model, prompt, row.adapter, end),
                tolerance=_demo_check.TOLERANCES[torch_dtype],
                ties=torch_dtype != torch.float32,
            )
        )
    texts = [
        row.prompt + tokenizer.decode(result.tokens, skip_special_tokens=True)
        for row, result in zip(rows, generated, strict=True)
    ]
    print_table(rows, ranks, texts, verdicts)

    _demo_check.round_parameters(peft_model, torch_dtype, compute=torch_dtype)
    length = ids.shape[1]
    options["min_new_tokens"] = tokens  # both sides then make the same number of tokens
    ours = _demo_check.tokens_per_second(
        lambda: model.generate(ids, adapters=adapters, **options)[:, length:]
    )
    # PEFT has no mixed batches for parameters that are adapted by their names.
    peft_batch = _demo_check.peft_in_turn if moe else _demo_check.peft_mixed
    theirs = _demo_check.tokens_per_second(
        lambda: peft_batch(peft_model, ids, adapters, options)[:, length:]
    )
    way = "one adapter after another" if moe else "adapter_names="
    print(
        f"\nthis batch: lora_ext {ours:.0f} tokens/s, PEFT ({way}) {theirs:.0f} tokens/s"
        "\n(a model this small measures the cost of calls, not of kernels)"
    )
    agreeing = sum(verdict.agrees for verdict in verdicts)
    print(f"{agreeing} of {len(rows)} rows agree with PEFT running their adapter alone", end="")
    print(f" (tolerance {_demo_check.TOLERANCES[torch_dtype]:.0e} of a row's largest logit)")
    return EXIT_OK if agreeing == len(rows) else EXIT_FAILED


def print_table(
    rows: Sequence[Row], ranks: dict[str, int], texts: list[str], verdicts: list[Verdict]
) -> None:
    notes = [verdict.note for verdict in verdicts]
    notes_width = max(map(len, notes))
    width = max(24, shutil.get_terminal_size((120, 24)).columns - notes_width - 24)
    print(f"{'row':<4} {'adapter':<10} {'rank':<5} {'text':<{width}} PEFT alone")
    for index, (row, text, note) in enumerate(zip(rows, texts, notes, strict=True)):
        shown = text if len(text) <= width else text[: width - 1] + "…"
        name, rank = (row.adapter, str(ranks[row.adapter])) if row.adapter else ("-", "-")
        print(f"{index:<4} {name:<10} {rank:<5} {shown:<{width}} {note}")
