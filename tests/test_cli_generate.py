"""lora-ext generate: results, what it refuses before any work, and resuming at any byte."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from demo_files import DemoFiles, make_demo_files
from lora_ext.cli import _generate_io as io
from lora_ext.cli import main
from lora_ext.cli._command import CommandError
from lora_ext.cli.generate import open_output

MAX_NEW_TOKENS = 6


@pytest.fixture(scope="module")
def files() -> DemoFiles:
    return make_demo_files()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(
        tmp_path / "prompts.jsonl",
        {"prompt": "The old", "adapter": "recipes"},
        {"prompt": "In the morning hours", "adapter": None, "id": "no adapter"},
        {"prompt": "The lion"},
        {"prompt": "At last", "adapter": "sea_log", "id": "naïve"},
        {"prompt": "A good hour", "adapter": "night_sky", "id": 77},
    )


def write_prompts(path: Path, *rows: dict[str, Any] | str) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def arguments(files: DemoFiles, prompts: Path, output: Path, *more: str) -> list[str]:
    return [
        *("generate", "--model", str(files.model), *files.adapter_options),
        *("--input", str(prompts), "--output", str(output), "--device", "cpu"),
        *("--max-new-tokens", str(MAX_NEW_TOKENS), "--batch-size", "2", *more),
    ]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_row_is_what_peft_makes_of_it(files: DemoFiles, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert main(arguments(files, prompts, output)) == 0
    rows = read_rows(output)
    assert [row["id"] for row in rows] == [1, "no adapter", 3, "naïve", 77]
    for row in rows:
        inputs = files.tokenizer(row["prompt"], return_tensors="pt")
        tokens = files.peft_model.generate(
            **inputs,
            adapter_names=[row["adapter"] or "__base__"],
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )[0, inputs["input_ids"].shape[1] :]
        assert row["text"] == files.tokenizer.decode(tokens, skip_special_tokens=True)
        stopped = files.tokenizer.eos_token_id in tokens
        assert row["finish"] == ("stop" if stopped else "length")
        assert row["num_tokens"] == len(tokens) - stopped


def test_the_base_model_alone(files: DemoFiles, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", {"prompt": "The old"})
    output = tmp_path / "out.jsonl"
    command = ["generate", "--model", str(files.model), "--input", str(prompts)]
    assert main([*command, "--output", str(output), "--max-new-tokens", "2"]) == 0
    assert len(read_rows(output)) == 1


# --- what is refused, before any work ------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: expected an object, got list"),
        ('{"prompt": 3}', "line 2: prompt must be a string, got 3"),
        ('{"text": "a"}', "line 2: unknown field 'text'"),
        ('{"prompt": "a", "adapter": 3}', "line 2: adapter must be a name or null, got 3"),
        (
            '{"prompt": "a", "adapter": "sql"}',
            "line 2: unknown adapter 'sql'; loaded by --adapter: night_sky, recipes, sea_log",
        ),
        ('{"prompt": "a", "id": 1.5}', "line 2: id must be a string or an integer, got 1.5"),
        ('{"prompt": "a", "id": true}', "line 2: id must be a string or an integer, got True"),
        ('{"prompt": "a", "id": 1}', "line 2: id 1 is that of line 1 already"),
        ('{"prompt": "\\ud800"}', "line 2: '\\ud800' has half a surrogate pair"),
        ('{"prompt": ""}', "line 2: the prompt is empty"),
        (json.dumps({"prompt": "a " * 600}), "exceed the model's 512 positions"),
    ],
)
def test_a_malformed_line_is_named(
    line: str, fault: str, files: DemoFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", {"prompt": "The old"}, line)
    output = tmp_path / "out.jsonl"
    assert main(arguments(files, prompts, output)) == 2
    assert fault in capsys.readouterr().err
    assert not output.exists()


def test_every_malformed_line_is_named(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", "{", '{"prompt": "a"}', "", "[", "]")
    with pytest.raises(CommandError) as error:
        io.read_prompts(prompts, ())
    assert [line.split(":")[0][-6:] for line in str(error.value).splitlines()] == [
        "line 1",
        "line 4",
        "line 5",
    ]


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(CommandError, match="line 2: not UTF-8"):
        io.read_prompts(prompts, ())


def damaged(files: DemoFiles, tmp_path: Path, part: str, damage: str) -> Path:
    """Return a copy of the model or an adapter whose weights are cut, missing or incomplete."""
    original = files.model if part == "model" else files.adapter("recipes")
    copy = tmp_path / "damaged"
    shutil.copytree(original, copy)
    weights = next(copy.glob("*.safetensors"))
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        weights.unlink()
    elif damage == "incomplete":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        del tensors[min(tensors)]
        save_file(tensors, weights, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("part", ["model", "adapter"])
@pytest.mark.parametrize("damage", ["cut", "missing", "incomplete"])
def test_an_unreadable_model_or_adapter_is_named(
    part: str,
    damage: str,
    files: DemoFiles,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = damaged(files, tmp_path, part, damage)
    output = tmp_path / "out.jsonl"
    output.write_text("from before")
    command = arguments(files, prompts, output, "--overwrite")
    original = files.model if part == "model" else files.adapter("recipes")
    command = [word.replace(str(original), str(copy)) for word in command]
    assert main(command) == 2
    named = f"--model {copy}: " if part == "model" else f"--adapter recipes={copy}: "
    assert named in capsys.readouterr().err
    assert output.read_text() == "from before"


def test_an_adapter_for_another_model_is_named(
    files: DemoFiles, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "wider"
    shutil.copytree(files.adapter("sea_log"), copy)
    weights = copy / "adapter_model.safetensors"
    tensors = {name: torch.cat([t, t], dim=-1) for name, t in load_file(weights).items()}
    tensors = {name: t[:, :16] if "lora_B" in name else t for name, t in tensors.items()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, weights)
    command = arguments(files, prompts, tmp_path / "out.jsonl")
    assert main([word.replace(str(files.adapter("sea_log")), str(copy)) for word in command]) == 2
    assert f"--adapter sea_log={copy}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "fault"),
    [
        (["--adapter", "recipes"], "expected NAME=DIR"),
        (["--adapter", "recipes=."], "the name recipes is given twice"),
        (["--adapter", "sql=no/such/folder"], "no/such/folder is not a folder"),
        (["--model", "no/such/folder"], "--model no/such/folder: not a folder"),
        (["--input", "no/such/file"], "--input no/such/file: No such file"),
        (["--output", "no/such/folder/out"], "no/such/folder is not a folder"),
        (["--output", "."], "--output .: not a regular file"),
        (["--device", "tpu"], "--device tpu: "),
    ],
)
def test_wrong_options_are_named(
    option: list[str],
    fault: str,
    files: DemoFiles,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments(files, prompts, tmp_path / "out.jsonl", *option)) == 2
    assert fault in capsys.readouterr().err


def test_an_existing_output_is_replaced_only_on_request(
    files: DemoFiles, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("from before")
    assert main(arguments(files, prompts, output)) == 2
    assert "--resume continues it, --overwrite replaces it" in capsys.readouterr().err
    assert output.read_text() == "from before"
    assert main(arguments(files, prompts, output, "--overwrite")) == 0
    assert len(read_rows(output)) == 5
    before = prompts.read_bytes()
    assert main(arguments(files, prompts, prompts, "--overwrite")) == 2
    assert prompts.read_bytes() == before


# --- resuming ------------------------------------------------------------------------------------


def test_resuming_works_from_every_byte(prompts: Path, tmp_path: Path) -> None:
    rows = io.read_prompts(prompts, ("recipes", "sea_log", "night_sky"))
    lines = [io.format_result(row, {"text": "ä\n\u2028"}).encode() for row in rows]
    whole = b"".join(lines)
    output = tmp_path / "out.jsonl"
    for size in range(len(whole) + 1):
        output.write_bytes(whole[:size])
        progress = io.read_progress(output, rows)
        with open_output(output, progress) as file:
            file.writelines(
                line for row, line in zip(rows, lines, strict=True) if row.id not in progress.done
            )
        assert output.read_bytes() == whole, f"cut at byte {size}"


def test_resuming_refuses_the_output_of_another_run(prompts: Path, tmp_path: Path) -> None:
    rows = io.read_prompts(prompts, ("recipes", "sea_log", "night_sky"))
    output = tmp_path / "out.jsonl"
    first = io.format_result(rows[0], {"text": "a"})
    other = {
        "not JSON": "x\n",
        "id 'zz' is not in the input": '{"id": "zz"}\n',
        "id 1 occurs twice": first,
        "id 3 has another prompt or adapter than line 3": '{"id": 3, "prompt": "The cat"}\n',
    }
    for fault, line in other.items():
        output.write_text(first + line)
        with pytest.raises(CommandError, match=f"line 2: {fault}"):
            io.read_progress(output, rows)
        assert output.read_text() == first + line


def test_an_interrupted_run_is_resumed(files: DemoFiles, tmp_path: Path) -> None:
    adapters = [None, "recipes", "sea_log", "night_sky"]
    prompts = write_prompts(
        tmp_path / "prompts.jsonl",
        *({"prompt": f"The {i}", "adapter": adapters[i % 4]} for i in range(400)),
    )
    output = tmp_path / "out.jsonl"
    command = arguments(files, prompts, output, "--batch-size", "1", "--max-new-tokens", "16")
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_ext.cli", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (output.exists() and output.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    num_written = len(read_rows(output))
    assert process.returncode == 130
    assert f"interrupted with {num_written} of 400 rows written; --resume continues" in errors
    assert 1 <= num_written < 400
    before = output.read_bytes()

    with output.open("a") as file:
        file.write('{"id": 1, "torn')
    assert main([*command, "--batch-size", "64", "--max-new-tokens", "1", "--resume"]) == 0
    assert output.read_bytes().startswith(before)
    assert [row["id"] for row in read_rows(output)] == list(range(1, 401))
