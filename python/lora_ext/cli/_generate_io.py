"""The files of ``lora-ext generate``: prompts in, results out, both as JSON lines."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._command import CommandError

Id = str | int
MAX_REPORTED = 10


@dataclass(frozen=True)
class Prompt:
    """One line of the input. ``id`` is its line number where the line has none."""

    line: int
    id: Id
    prompt: str
    adapter: str | None


@dataclass(frozen=True)
class Progress:
    """What an interrupted run left: the ids it finished, and how many bytes of whole lines."""

    done: frozenset[Id]
    size: int
    ends_without_newline: bool


def read_prompts(path: Path, adapters: Collection[str]) -> list[Prompt]:
    """Read and check every line of ``path``; empty lines are skipped.

    Raises:
        CommandError: the file cannot be read, or lines are wrong; names each line and its fault.
    """
    prompts: list[Prompt] = []
    lines_of: dict[Id, int] = {}
    faults = []
    for line, text in _numbered_lines(path):
        if not text.strip():
            continue
        try:
            prompt = _parse_prompt(line, text, adapters)
            if prompt.id in lines_of:
                raise ValueError(f"id {prompt.id!r} is that of line {lines_of[prompt.id]} already")
        except ValueError as error:
            faults.append(f"{path}, line {line}: {error}")
            continue
        lines_of[prompt.id] = line
        prompts.append(prompt)
    raise_faults(faults)
    return prompts


def read_progress(path: Path, prompts: list[Prompt]) -> Progress:
    """Read the output ``path`` of an earlier run over ``prompts``; a torn last line does not count.

    Raises:
        CommandError: the file cannot be read, or a whole line is not a result for these prompts.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Progress(frozenset(), 0, False)
    except OSError as error:
        raise CommandError(f"--output {path}: {error.strerror}") from error
    by_id = {prompt.id: prompt for prompt in prompts}
    done: set[Id] = set()
    faults = []
    size = 0
    for line, raw in enumerate(io.BytesIO(data), start=1):
        is_whole = raw.endswith(b"\n")
        try:
            done.add(_parse_result(raw, by_id, done))
        except ValueError as error:
            if not is_whole:
                break
            faults.append(f"{path}, line {line}: {error}")
        size += len(raw)
    raise_faults(faults)
    return Progress(frozenset(done), size, size > 0 and data[size - 1 : size] != b"\n")


def raise_faults(faults: list[str]) -> None:
    """Raise CommandError with the first of ``faults``, where there are any."""
    if len(faults) > MAX_REPORTED:
        faults = [*faults[:MAX_REPORTED], f"and {len(faults) - MAX_REPORTED} more"]
    if faults:
        raise CommandError("\n".join(faults))


def format_result(prompt: Prompt, result: dict[str, Any]) -> str:
    """Return the line of the output file for ``prompt``."""
    record = {"id": prompt.id, "prompt": prompt.prompt, "adapter": prompt.adapter, **result}
    return json.dumps(record, ensure_ascii=False) + "\n"


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CommandError(f"--input {path}: {error.strerror}") from error
    for line, raw in enumerate(data.split(b"\n"), start=1):
        try:
            yield line, raw.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise CommandError(f"{path}, line {line}: not UTF-8: {error.reason}") from error


def _parse_object(text: str | bytes) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason}") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    return record


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse_prompt(line: int, text: str, adapters: Collection[str]) -> Prompt:
    record = _parse_object(text)
    unknown = sorted(record.keys() - {"prompt", "adapter", "id"})
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; expected prompt, adapter and id")
    prompt, adapter, row_id = record.get("prompt"), record.get("adapter"), record.get("id", line)
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be a string, got {prompt!r}")
    if adapter is not None and not isinstance(adapter, str):
        raise ValueError(f"adapter must be a name or null, got {adapter!r}")
    if adapter is not None and adapter not in adapters:
        known = ", ".join(sorted(adapters)) or "none"
        raise ValueError(f"unknown adapter {adapter!r}; loaded by --adapter: {known}")
    if isinstance(row_id, bool) or not isinstance(row_id, str | int):
        raise ValueError(f"id must be a string or an integer, got {row_id!r}")
    for value in (prompt, row_id):
        if isinstance(value, str) and not _is_unicode(value):
            raise ValueError(f"{value!r} has half a surrogate pair")
    return Prompt(line, row_id, prompt, adapter)


def _parse_result(raw: bytes, prompts: dict[Id, Prompt], done: set[Id]) -> Id:
    record = _parse_object(raw)
    row_id = record.get("id")
    if isinstance(row_id, bool) or not isinstance(row_id, str | int) or row_id not in prompts:
        raise ValueError(f"id {row_id!r} is not in the input: is this the output of another run?")
    if row_id in done:
        raise ValueError(f"id {row_id!r} occurs twice")
    prompt = prompts[row_id]
    if (record.get("prompt"), record.get("adapter")) != (prompt.prompt, prompt.adapter):
        raise ValueError(
            f"id {row_id!r} has another prompt or adapter than line {prompt.line} of the input"
        )
    return row_id
