"""The Python of docs/integration.md runs; what needs an engine is compiled."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "integration.md"


def test_the_snippets_run() -> None:
    parts = DOCUMENT.read_text(encoding="utf-8").split("```python\n")
    variables: dict[str, object] = {}
    for before, part in pairwise(parts):
        code = compile(part.split("```")[0], DOCUMENT.name, "exec")
        if not before.endswith("<!-- needs SGLang -->\n"):
            exec(code, variables)
    y = variables["y"]
    assert y.shape == (9, 96) and y.isfinite().all()
    assert variables["backend"].batch_info.use_cuda_graph
