"""README.md's Python, in its order, and the examples, run as a reader would."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")

from demo_files import make_demo_files

ROOT = Path(__file__).resolve().parents[1]
NEEDS_GPU = "<!-- needs a GPU -->"


def snippets(*, on_gpu: bool) -> str:
    """Return README's Python with every line at its number, so that a traceback shows it.

    The blocks that need a GPU are left out unless ``on_gpu``.
    """
    code, inside, skip = [], False, False
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if line == "```":
            inside = False
        code.append(line if inside and not skip else "")
        if line == "```python":
            inside = True
        elif not inside:
            skip = line == NEEDS_GPU and not on_gpu
    return "\n".join(code)


def run_readme(monkeypatch: pytest.MonkeyPatch, *, on_gpu: bool) -> None:
    monkeypatch.chdir(make_demo_files().directory.parent)
    exec(compile(snippets(on_gpu=on_gpu), "README.md", "exec"), {})


def test_the_readme_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_readme(monkeypatch, on_gpu=False)
    printed = capsys.readouterr().out
    assert all(f"{name} | " in printed for name in ("recipes", None, "sea_log")), printed


@pytest.mark.gpu
def test_the_readme_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    run_readme(monkeypatch, on_gpu=True)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_the_examples_run(path: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("document", ["README.md", "docs/design.md"])
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    links = re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (path.parent / link).exists()] == []
