"""``lora-ext generate``: a file of prompts through one model, each with its adapter or none."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO

from . import _generate_io as files
from ._command import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    CommandError,
    positive_int,
    quiet_transformers,
    require,
    resolve_device,
)

if TYPE_CHECKING:
    import torch

    from ..integrations.hf import LoRAModel

SUMMARY = "generate text for a file of prompts, each with its own adapter or none"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="a Hugging Face model's folder"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a PEFT adapter's folder and the name by which prompts ask for it; may be repeated",
    )
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        metavar="FILE",
        help='JSON lines {"prompt": text, "adapter": name or null, "id": optional}',
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="JSON lines, one per prompt"
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", help="continue the output of an interrupted run"
    )
    existing.add_argument(
        "--overwrite", action="store_true", help="replace an existing output file"
    )
    parser.add_argument("--batch-size", type=positive_int, default=8, help="default: %(default)s")
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=64, help="default: %(default)s"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="default: that of the model's files"
    )


def run(args: argparse.Namespace) -> int:
    """Check everything, then generate; CommandError means that nothing was written."""
    adapters = parse_adapters(args.adapter)
    prompts = files.read_prompts(args.input, adapters)
    progress = check_output(args, prompts)
    require("transformers", "tqdm")
    quiet_transformers()
    device = resolve_device(args.device)
    model, tokenizer = load(args.model, adapters, device=device, dtype=args.dtype)
    todo = encode(prompts, model.model, tokenizer, args)
    todo = [(prompt, ids) for prompt, ids in todo if prompt.id not in progress.done]
    try:
        with open_output(args.output, progress) as file:
            return generate_all(model, tokenizer, todo, len(progress.done), file, args)
    except OSError as error:
        print(f"lora-ext generate: --output {args.output}: {error.strerror}", file=sys.stderr)
        return EXIT_FAILED


def parse_adapters(arguments: list[str]) -> dict[str, Path]:
    adapters: dict[str, Path] = {}
    for argument in arguments:
        name, separator, path = argument.partition("=")
        if not (name and separator and path):
            raise CommandError(f"--adapter {argument}: expected NAME=DIR")
        if name in adapters:
            raise CommandError(f"--adapter {argument}: the name {name} is given twice")
        if not Path(path).is_dir():
            raise CommandError(f"--adapter {argument}: {path} is not a folder")
        adapters[name] = Path(path)
    return adapters


def check_output(args: argparse.Namespace, prompts: list[files.Prompt]) -> files.Progress:
    """Check that the output may be written; returns what ``--resume`` keeps of it."""
    output: Path = args.output
    if output.exists():
        if not output.is_file():
            raise CommandError(f"--output {output}: not a regular file")
        if output.samefile(args.input):
            raise CommandError(f"--output {output}: is the input")
        if not (args.resume or args.overwrite):
            raise CommandError(
                f"--output {output}: exists; --resume continues it, --overwrite replaces it"
            )
        if not os.access(output, os.W_OK):
            raise CommandError(f"--output {output}: not writable")
    elif not output.parent.is_dir():
        raise CommandError(f"--output {output}: {output.parent} is not a folder")
    if args.resume:
        return files.read_progress(output, prompts)
    return files.Progress(frozenset(), 0, False)


def load(
    path: Path, adapters: dict[str, Path], *, device: str, dtype: str
) -> tuple[LoRAModel, Any]:
    """Load the model, its tokenizer and all adapters; CommandError names the one that fails."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lora_ext

    load_model: Any = AutoModelForCausalLM.from_pretrained
    if not path.is_dir():
        raise CommandError(f"--model {path}: not a folder")
    # Files made by others fail in any way (OSError, ValueError, KeyError, SafetensorError, ...).
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        base, info = load_model(path, dtype=dtype, local_files_only=True, output_loading_info=True)
    except Exception as error:
        raise CommandError(f"--model {path}: {type(error).__name__}: {error}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CommandError(
            f"--model {path}: its files lack {len(missing)} weights: {missing[0]}, …"
        )
    loaded = {}
    for name, adapter_path in adapters.items():
        try:
            loaded[name] = lora_ext.load_adapter(adapter_path)
        except (OSError, ValueError) as error:
            raise CommandError(f"--adapter {name}={adapter_path}: {error}") from error
    try:
        model = lora_ext.wrap(
            base.to(device).eval(),
            max_adapters=max(1, len(loaded)),
            max_rank=max((adapter.max_rank for adapter in loaded.values()), default=1),
        )
    except ValueError as error:
        raise CommandError(f"--model {path}: {error}") from error
    for name, adapter in loaded.items():
        try:
            model.load_adapter(name, adapter)
        except ValueError as error:
            raise CommandError(f"--adapter {name}={adapters[name]}: {error}") from error
    return model, tokenizer


def encode(
    prompts: list[files.Prompt], model: Any, tokenizer: Any, args: argparse.Namespace
) -> list[tuple[files.Prompt, list[int]]]:
    """Return the token ids of every prompt, checked to fit the model."""
    limit = getattr(model.config, "max_position_embeddings", None)
    encoded, faults = [], []
    for prompt in prompts:
        ids = tokenizer(prompt.prompt)["input_ids"]
        if not ids:
            faults.append(f"{args.input}, line {prompt.line}: the prompt is empty")
        elif limit is not None and len(ids) + args.max_new_tokens > limit:
            faults.append(
                f"{args.input}, line {prompt.line}: {len(ids)} tokens and --max-new-tokens"
                f" {args.max_new_tokens} exceed the model's {limit} positions"
            )
        encoded.append((prompt, ids))
    files.raise_faults(faults)
    return encoded


def open_output(path: Path, progress: files.Progress) -> BinaryIO:
    """Open ``path`` for writing behind the finished rows; what lies behind them is cut off."""
    file = path.open("r+b" if progress.size else "wb")
    file.truncate(progress.size)
    file.seek(progress.size)
    if progress.ends_without_newline:
        file.write(b"\n")
    return file


def generate_all(
    model: LoRAModel,
    tokenizer: Any,
    todo: list[tuple[files.Prompt, list[int]]],
    num_done: int,
    file: BinaryIO,
    args: argparse.Namespace,
) -> int:
    """Generate ``todo`` in batches, in the order of the input; every result is written at once."""
    from tqdm import tqdm

    written = num_done
    total = num_done + len(todo)
    try:
        with (
            _noted_interrupts() as interrupts,
            tqdm(total=total, initial=num_done, unit="row", disable=None) as bar,
        ):
            for start in range(0, len(todo), args.batch_size):
                if interrupts:
                    raise KeyboardInterrupt
                batch = todo[start : start + args.batch_size]
                for line in generate_batch(model, tokenizer, batch, args.max_new_tokens):
                    file.write(line.encode())
                    file.flush()
                    written += 1
                    bar.update()
    except KeyboardInterrupt:
        print(
            f"lora-ext generate: interrupted with {written} of {total} rows written;"
            " --resume continues",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    print(f"lora-ext generate: {total} rows in {args.output}", file=sys.stderr)
    return EXIT_OK


def generate_batch(
    model: LoRAModel,
    tokenizer: Any,
    batch: list[tuple[files.Prompt, list[int]]],
    max_new_tokens: int,
) -> Iterator[str]:
    """Generate one mixed batch greedily; yields the line of each row."""
    import torch
    from transformers import GenerationConfig

    make_config: Any = GenerationConfig
    ends = end_tokens(model.model, tokenizer)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = ends[0] if ends else 0
    width = max(len(ids) for _, ids in batch)
    ids = torch.tensor([[pad] * (width - len(row)) + row for _, row in batch])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for _, row in batch])
    device = model.model.device
    sequences: torch.Tensor = model.generate(
        ids.to(device),
        attention_mask=mask.to(device),
        adapters=[prompt.adapter for prompt, _ in batch],
        generation_config=make_config(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=ends or None,
        ),
    )
    for (prompt, _), row in zip(batch, sequences[:, width:].tolist(), strict=True):
        length = next((i for i, token in enumerate(row) if token in ends), None)
        tokens = row if length is None else row[:length]
        yield files.format_result(
            prompt,
            {
                "text": tokenizer.decode(tokens, skip_special_tokens=True),
                "num_tokens": len(tokens),
                "finish": "length" if length is None else "stop",
            },
        )


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens at which the model ends a text, as its generation config has them."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else list(ends)


@contextlib.contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """Collect the interrupts of the block, which raise KeyboardInterrupt as ever.

    Python drops an exception that is raised in a finalizer or a weak reference's callback; one that
    came just then is still in the list.
    """
    noted: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, _frame: FrameType | None) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
