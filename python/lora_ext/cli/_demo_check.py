"""Compares a generated batch with PEFT, row by row, and times both."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

# Largest difference of two logits that counts as agreement, relative to the row's largest logit.
# PEFT computes in float32, on weights rounded to the batch's dtype. In float32 each of some twenty
# products in a row rounds to 1e-7 and is summed in another order: 2e-6 was seen. In half precision
# every layer's output is rounded to 2**-8 or 2**-11: up to 8 of these units were seen, and up to 9
# with PEFT itself in half precision. For scale: a scaling 1 % off changes a row's logits by 0.012
# or more, a module left out by 0.3.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 12 * 2.0**-8, torch.float16: 12 * 2.0**-11}


@dataclass(frozen=True)
class Row:
    """One row of the batch; ``adapter`` None runs the base model."""

    prompt: str
    adapter: str | None


@dataclass(frozen=True)
class Generated:
    """What a model made of one row: new tokens [n] int64, and the logits [n, V] of each, fp32."""

    tokens: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class Verdict:
    agrees: bool
    error: float  # largest difference of two logits, over the row's largest logit
    note: str


# Continues a row: (tokens generated so far, how many more) -> what comes next.
Continue = Callable[[torch.Tensor, int], Generated]


def split_rows(output: Any, prompt_length: int, end: int) -> list[Generated]:
    """Split what ``generate(return_dict_in_generate=True, output_logits=True)`` returned.

    Args:
        output: its sequences are [B, prompt_length + n], its logits n tensors [B, V].
        end: a row stops at this token, which belongs to it; what follows is padding.
    """
    logits = torch.stack([step.float() for step in output.logits], dim=1)
    rows = []
    for tokens, row_logits in zip(output.sequences[:, prompt_length:], logits, strict=True):
        ends = (tokens == end).nonzero()
        length = int(ends[0]) + 1 if len(ends) else len(tokens)
        rows.append(Generated(tokens[:length].cpu(), row_logits[:length].cpu()))
    return rows


def round_parameters(model: torch.nn.Module, dtype: torch.dtype, *, compute: torch.dtype) -> None:
    """Round the parameters to ``dtype`` and hold them in ``compute``.

    Parameters alone: a cast of the rotary buffers, which stay float32, would change the model.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).to(compute)


def peft_alone(model: PeftModel, prompt: torch.Tensor, adapter: str | None, end: int) -> Continue:
    """Return how PEFT continues ``prompt`` [1, P] with one adapter: one row, no padding, greedy."""

    generate: Any = model.generate

    def continue_row(so_far: torch.Tensor, count: int) -> Generated:
        ids = torch.cat([prompt, so_far.to(prompt)[None]], dim=1)
        with _peft_with(model, adapter):
            output = generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        return split_rows(output, ids.shape[1], end)[0]

    return continue_row


@contextlib.contextmanager
def _peft_with(model: PeftModel, adapter: str | None) -> Iterator[None]:
    """Let PEFT compute with one adapter, or with none, in a ``with`` block."""
    if adapter is not None:
        model.set_adapter(adapter)
    with model.disable_adapter() if adapter is None else contextlib.nullcontext():
        yield


def peft_mixed(
    model: PeftModel,
    ids: torch.Tensor,
    adapters: Sequence[str | None],
    options: Mapping[str, Any],
) -> torch.Tensor:
    """Generate a batch with PEFT's own mix of adapters."""
    generate: Any = model.generate
    names = [name or "__base__" for name in adapters]
    tokens: torch.Tensor = generate(input_ids=ids, adapter_names=names, **options)
    return tokens


def peft_in_turn(
    model: PeftModel,
    ids: torch.Tensor,
    adapters: Sequence[str | None],
    options: Mapping[str, Any],
) -> torch.Tensor:
    """Generate the rows of one adapter after the other; ``options`` has an attention_mask."""
    generate: Any = model.generate
    tokens = []
    for adapter in dict.fromkeys(adapters):
        rows = [row for row, name in enumerate(adapters) if name == adapter]
        own = {**options, "attention_mask": options["attention_mask"][rows]}
        with _peft_with(model, adapter):
            tokens.append(generate(input_ids=ids[rows], **own))
    return torch.cat(tokens)


def compare(row: Generated, reference: Continue, *, tolerance: float, ties: bool) -> Verdict:
    """Compare every token and every logit of ``row`` with ``reference``.

    With ``ties`` a differing token is accepted where the reference's own logits for the two are
    closer than rounding can tell (twice the tolerance); the reference then continues from the token
    of ``row``, so that every position is compared. float32 needs no ties.
    """
    error, num_ties, start = 0.0, 0, 0
    while start < len(row.tokens):
        expected = reference(row.tokens[:start], len(row.tokens) - start)
        tokens, logits = row.tokens[start:], row.logits[start:]
        length = min(len(tokens), len(expected.tokens))
        differing = (tokens[:length] != expected.tokens[:length]).nonzero()
        same = int(differing[0]) if len(differing) else length
        # The logits at the first differing token still come from the same text.
        compared = min(same + 1, length)
        scale = expected.logits.abs().max()
        gap = float((logits[:compared] - expected.logits[:compared]).abs().max() / scale)
        error = gap if not gap <= error else error  # keeps a NaN
        if same == len(tokens):
            break
        if same < length:
            ours, theirs = tokens[same], expected.tokens[same]
            margin = float((expected.logits[same, theirs] - expected.logits[same, ours]) / scale)
        else:
            margin = float("inf")
        if not (ties and margin <= 2 * tolerance):
            return Verdict(False, error, f"DISAGREES at token {start + same}")
        num_ties += 1
        start += same + 1
    if not error <= tolerance:
        return Verdict(False, error, f"DISAGREES: logits by {error:.0e}")
    note = f"{len(row.tokens)} tokens equal" + (f" but {num_ties} ties" if num_ties else "")
    return Verdict(True, error, f"{note}, logits to {error:.0e}")


def tokens_per_second(generate: Callable[[], torch.Tensor], repeats: int = 5) -> float:
    """Return the median speed of ``generate``, which returns the new tokens [B, n]."""
    generate()
    speeds = []
    for _ in range(repeats):
        start = time.perf_counter()
        tokens = generate().cpu()  # waits for the device
        speeds.append(tokens.numel() / (time.perf_counter() - start))
    return statistics.median(speeds)
