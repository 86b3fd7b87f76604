"""The lora-ext command: its registry, collect-env and demo."""

from __future__ import annotations

import argparse
import copy
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_ext
from lora_ext import _build_info
from lora_ext.cli import commands, main
from lora_ext.cli.collect_env import covers

pytest.importorskip("peft")

from demo_files import DemoFiles, make_demo_files
from lora_ext.cli import demo
from lora_ext.cli._demo_check import Generated, compare, split_rows

PACKAGE = Path(lora_ext.__file__).parent
VOCABULARY = 5


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def files(request: pytest.FixtureRequest) -> DemoFiles:
    return make_demo_files(request.param)


def check(files: DemoFiles, directory: Path, peft_model: object, **options: Any) -> int:
    """Run the demo's second half."""
    return demo.check(directory, peft_model, files.tokenizer, moe=files.moe, **options)


def make_row(tokens: list[int], seed: int = 0) -> Generated:
    """Return a row whose largest logit, 1, is that of its token at each position."""
    logits = torch.rand(len(tokens), VOCABULARY, generator=torch.manual_seed(seed)) / 2
    logits[range(len(tokens)), tokens] = 1.0
    return Generated(torch.tensor(tokens), logits)


def continue_with(expected: Generated) -> Callable[[torch.Tensor, int], Generated]:
    """Return a reference that says what ``expected`` says, wherever it continues."""

    def reference(so_far: torch.Tensor, count: int) -> Generated:
        part = slice(len(so_far), len(so_far) + count)
        return Generated(expected.tokens[part], expected.logits[part])

    return reference


# --- the command ---------------------------------------------------------------------------------


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"collect-env", "demo", "generate"} <= commands().keys()
    for name, command in commands().items():
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        assert command.SUMMARY in " ".join(capsys.readouterr().out.split())


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, lora_ext.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "finally: assert not {'transformers', 'peft', 'tokenizers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_wrong_arguments_have_status_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    assert main(["demo", "--device", "cuda:99"]) == 2
    assert main(["demo", "--device", "nonsense"]) == 2
    assert main(["demo", "--tokens", "1000"]) == 2
    assert main(["demo", "--moe", "--dtype", "bfloat16"]) == 2
    assert main(["demo", "--keep", str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 5 and all(line.startswith("lora-ext demo: --") for line in errors)


# --- collect-env ---------------------------------------------------------------------------------


def test_collect_env_reports_build_and_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect-env"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and f"torch >= {_build_info.TORCH_TARGET}" in out
    assert "library          loads" in out
    assert "not readable" not in out


@pytest.mark.parametrize("library", [None, b"", b"not a library"], ids=["none", "empty", "garbage"])
def test_collect_env_works_where_the_library_does_not(
    library: bytes | None, tmp_path: Path
) -> None:
    package = tmp_path / "lora_ext"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if library is None:
        (package / "_build_info.py").unlink()
    else:
        (package / "_C.so").write_bytes(library)

    def lora_ext_command(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "lora_ext.cli", name],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    done = lora_ext_command("collect-env")
    assert done.returncode == 0, done.stderr
    assert str(package) in done.stdout
    assert ("not built" if library is None else "does not load: cannot load") in done.stdout
    assert "pip install ." in done.stdout.partition("missing")[2]
    done = lora_ext_command("demo")
    assert done.returncode == 2
    assert "lora-ext demo: lora-ext collect-env says more" in done.stderr


@pytest.mark.parametrize(
    ("architectures", "capability", "covered"),
    [
        ("80;90a-real", (8, 0), True),
        ("80;90a-real", (9, 0), True),
        ("80;90a-real", (12, 0), True),  # through the PTX of 8.0
        ("80-real;90a-real", (8, 6), True),
        ("80-real;90a-real", (10, 0), False),
        ("90a-real", (8, 0), False),
        ("90a", (10, 0), False),
        ("80-virtual", (8, 0), True),
        ("", (9, 0), False),
    ],
)
def test_whether_kernels_run_on_a_gpu(
    architectures: str, capability: tuple[int, int], covered: bool
) -> None:
    assert covers(architectures, *capability) is covered


# --- demo ----------------------------------------------------------------------------------------


def test_demo_agrees_with_peft(files: DemoFiles, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(files, files.directory, files.peft_model, tokens=8) == 0
    out = capsys.readouterr().out
    assert out.count("8 tokens equal") == len(demo.PROMPTS)
    way = "one adapter after another" if files.moe else "adapter_names="
    assert "DISAGREES" not in out and f"PEFT ({way})" in out


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", demo.DTYPES)
def test_demo_agrees_with_peft_on_a_gpu(
    files: DemoFiles, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if files.moe and dtype != "float32":
        pytest.skip("rounding sends tokens to other experts")
    # The check rounds the weights of PEFT's model.
    peft_model = copy.deepcopy(files.peft_model)
    status = check(files, files.directory, peft_model, device="cuda", dtype=dtype, tokens=8)
    assert status == 0, capsys.readouterr().out


def test_demo_finds_a_wrong_adapter(
    files: DemoFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 1 % more scaling for one adapter: the rows of the others still agree.
    directory = tmp_path / "demo"
    shutil.copytree(files.directory, directory)
    config_file = directory / "adapters" / "recipes" / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config["lora_alpha"] *= 1.01
    config_file.write_text(json.dumps(config))
    assert check(files, directory, files.peft_model, tokens=4) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "DISAGREES" in line]
    assert [line[1] for line in lines] == ["recipes", "recipes"]


@pytest.mark.parametrize("options", [[], ["--moe"]], ids=["dense", "moe"])
def test_demo_keeps_what_generate_reads(
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "BASE_STEPS", 5)
    monkeypatch.setattr(demo, "ADAPTER_STEPS", 5)
    arguments = ["demo", *options, "--device", "cpu", "--tokens", "4", "--keep", "my demo"]
    assert main(arguments) == 0
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert main([*shlex.split(last_line)[1:], "--device", "cpu", "--max-new-tokens", "4"]) == 0
    rows = [json.loads(line) for line in Path("out.jsonl").read_text("utf-8").splitlines()]
    assert [(row["prompt"], row["adapter"]) for row in rows] == list(demo.PROMPTS)


# --- the comparison ------------------------------------------------------------------------------


def test_compare_equal_rows() -> None:
    row = make_row([3, 1, 4])
    verdict = compare(row, continue_with(row), tolerance=1e-6, ties=False)
    assert verdict.agrees and verdict.error == 0.0


def test_compare_finds_another_token() -> None:
    expected = make_row([3, 1, 4])
    row = Generated(torch.tensor([3, 2, 4]), expected.logits)
    for ties in (False, True):
        verdict = compare(row, continue_with(expected), tolerance=1e-2, ties=ties)
        assert not verdict.agrees and verdict.note == "DISAGREES at token 1"


def test_compare_finds_other_logits_also_behind_a_tie() -> None:
    expected = make_row([3, 1, 4])
    logits = expected.logits.clone()
    logits[1, 2] = 1.0 - 1e-4  # the runner-up at position 1
    expected = Generated(expected.tokens, logits)
    row = Generated(torch.tensor([3, 2, 4]), logits.clone())
    assert not compare(row, continue_with(expected), tolerance=1e-2, ties=False).agrees
    verdict = compare(row, continue_with(expected), tolerance=1e-2, ties=True)
    assert verdict.agrees and "1 ties" in verdict.note
    row.logits[2, 0] += 0.1
    assert not compare(row, continue_with(expected), tolerance=1e-2, ties=True).agrees


def test_compare_does_not_take_nan_for_agreement() -> None:
    expected = make_row([3, 1, 4])
    row = Generated(expected.tokens, expected.logits.clone())
    row.logits[0, 0] = float("nan")
    assert not compare(row, continue_with(expected), tolerance=1.0, ties=True).agrees


@pytest.mark.parametrize(("ours", "theirs"), [([3, 1], [3, 1, 4]), ([3, 1, 4], [3, 1])])
def test_compare_finds_another_length(ours: list[int], theirs: list[int]) -> None:
    # A row ends early only with the end token, so that a length differs only where a token does.
    end = 0
    row, expected = make_row([*ours, end][:3]), make_row([*theirs, end][:3])
    assert not compare(row, continue_with(expected), tolerance=1.0, ties=False).agrees


def test_rows_end_at_the_end_token() -> None:
    logits = tuple(torch.rand(2, VOCABULARY) for _ in range(3))
    sequences = torch.tensor([[7, 7, 1, 0, 0], [7, 7, 1, 2, 3]])
    output = argparse.Namespace(sequences=sequences, logits=logits)
    rows = split_rows(output, prompt_length=2, end=0)
    assert [row.tokens.tolist() for row in rows] == [[1, 0], [1, 2, 3]]
    assert [len(row.logits) for row in rows] == [2, 3]
