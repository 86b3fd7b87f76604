"""The build's decisions, and what an import of the package costs, loads and reports."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lora_ext import _build_info, _library

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def backend() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_build_backend", ROOT / "_build_backend.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def make_nvcc(directory: Path, release: str) -> Path:
    """Write a compiler that knows nothing but its version."""
    nvcc = directory / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return nvcc


def test_the_installed_torch_is_found_and_none_is_asked_for(backend: ModuleType) -> None:
    assert backend.find_torch() == Path(torch.__file__).parent
    for requires in (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable):
        assert not [r for r in requires() if r.startswith("torch")]


def test_torch_is_asked_for_where_none_is_installed(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "find_torch", lambda: None)
    assert backend.TESTED_TORCH in backend.get_requires_for_build_wheel()


def test_no_cuda_on_request(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORA_EXT_NO_CUDA", "1")
    assert backend.find_nvcc() is None
    assert capsys.readouterr().out == "lora_ext: CPU-only build, because LORA_EXT_NO_CUDA=1\n"


def test_cuda_home_decides(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("LORA_EXT_NO_CUDA", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="has no bin/nvcc"):
        backend.find_nvcc()
    nvcc = make_nvcc(tmp_path, "12.4")
    assert backend.find_nvcc() == nvcc


def test_an_old_nvcc_is_refused(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("LORA_EXT_NO_CUDA", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    make_nvcc(tmp_path, "12.3")
    with pytest.raises(RuntimeError, match=r"is CUDA 12\.3; lora_ext needs 12\.4 or newer"):
        backend.find_nvcc()


@pytest.mark.parametrize(
    ("arch_list", "architectures"),
    [
        ("", "80;90a-real"),
        ("9.0a", "90a-real"),
        ("8.0;8.6+PTX", "80-real;86"),
        ("8.9 12.0f", "89-real;120f-real"),
    ],
)
def test_architectures(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, arch_list: str, architectures: str
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", arch_list)
    assert backend.cuda_architectures() == architectures


def test_an_unknown_architecture_is_named(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;Hopper")
    with pytest.raises(RuntimeError, match="'Hopper'"):
        backend.cuda_architectures()


def test_the_import_is_fast() -> None:
    now = "time.perf_counter()"
    code = f"import time, torch; t = {now}; import lora_ext; print({now} - t)"
    # The shortest of several: the first also reads the files from disk.
    assert min(float(run_python(code)) for _ in range(5)) < 0.1


def test_the_import_leaves_optional_packages_alone() -> None:
    code = "import sys, lora_ext; print([m for m in ('transformers', 'peft') if m in sys.modules])"
    assert run_python(code) == "[]\n"


def test_a_library_that_does_not_load_says_what_it_was_built_for(tmp_path: Path) -> None:
    library = tmp_path / "_C.so"
    library.write_bytes(b"no library")
    with pytest.raises(ImportError) as caught:
        _library.load(library)
    message = str(caught.value)
    built = [_build_info.TORCH_TARGET, _build_info.CUDA_VERSION, _build_info.CUDA_ARCHITECTURES]
    for part in [str(library), *built, _build_info.PLATFORM, torch.__version__]:
        assert part in message


def test_an_unbuilt_source_tree_says_so(tmp_path: Path) -> None:
    package = tmp_path / "lora_ext"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_library.py").write_text(Path(_library.__file__).read_text())
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import lora_ext._library"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: lora_ext is not built here: run `pip install .`" in failed.stderr
