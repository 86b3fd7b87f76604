"""``import lora_ext`` registers the ops, is quick, and says why where the library does not load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lora_ext


def run(code: str, *options: str) -> str:
    result = subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_ops_are_registered_and_nothing_heavy_is_loaded() -> None:
    code = """
import time, torch
begin = time.perf_counter()
import lora_ext
seconds = time.perf_counter() - begin
import sys
assert torch.ops.lora_ext.lora_apply_.default
assert not {"transformers", "peft", "safetensors", "lora_ext.reference"} & sys.modules.keys()
assert seconds < 0.1, seconds
"""
    run(code)


def test_every_exported_name_is_there() -> None:
    for name in lora_ext.__all__:
        assert getattr(lora_ext, name) is not None
    assert set(lora_ext.__all__) <= set(dir(lora_ext))
    assert not hasattr(lora_ext, "no_such_name")


def test_a_library_that_does_not_load(tmp_path: Path) -> None:
    """The package imports with a warning; what needs the ops raises, with the reason."""
    package = tmp_path / "lora_ext"
    package.mkdir()
    for path in Path(lora_ext.__file__).parent.iterdir():
        (package / path.name).symlink_to(path)
    (package / "_C.so").unlink()
    (package / "_C.so").write_bytes(b"not a library")
    code = f"""
import sys, warnings
sys.path.insert(0, {str(tmp_path)!r})
with warnings.catch_warnings(record=True) as caught:
    import lora_ext
assert "built for: lora_ext" in str(caught[0].message) and len(caught) == 1
try:
    lora_ext.wrap
except ImportError as error:
    assert "cannot load" in str(error) and "running:   torch" in str(error)
else:
    raise AssertionError
"""
    run(code)
