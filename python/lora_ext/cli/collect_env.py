"""``lora-ext collect-env``: what is installed, what is missing and how to get it.

Needs only the standard library: every probe is guarded, so that it also says why lora_ext or torch
does not load. Where not even the command starts, run this file itself: ``python collect_env.py``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SUMMARY = "print versions, build and GPU, what is missing and how to get it"
MIN_TORCH = (2, 10)
REBUILD = "pip install . --no-build-isolation (in the source tree)"
PACKAGES = ("numpy", "safetensors", "transformers", "peft", "tokenizers", "tqdm")

Section = list[tuple[str, str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare nothing: the command has no options."""


def run(args: argparse.Namespace) -> int:
    sections, missing = collect()
    for title, rows in sections.items():
        print(title)
        for name, value in rows:
            indented = value.strip().replace("\n", "\n" + " " * 19)
            print(f"  {name:<16} {indented}")
    print("missing" if missing else "missing: nothing")
    for line in missing:
        print(f"  {line}")
    return 0


def collect() -> tuple[dict[str, Section], list[str]]:
    """Return the sections of the report, and what is missing with how to get it."""
    missing: list[str] = []
    sections = {
        "lora_ext": probe(lora_ext_rows, missing),
        "torch": probe(torch_rows, missing),
        "GPU": probe(gpu_rows, missing),
        "system": probe(system_rows, missing),
        "build tools": probe(tool_rows, missing),
        "packages": probe(package_rows, missing),
    }
    return sections, missing


def probe(rows: Callable[[list[str]], Section], missing: list[str]) -> Section:
    """Call ``rows``; whatever it raises becomes its section."""
    try:
        return rows(missing)
    except Exception as error:
        return [("not readable", f"{type(error).__name__}: {error}")]


def lora_ext_rows(missing: list[str]) -> Section:
    rows = [("installed", version_of("lora_ext") or "no"), ("folder", str(package_folder()))]
    info = build_info()
    if info is None:
        missing.append(f"the library is not built: {REBUILD}")
        return [*rows, ("library", "not built")]
    rows += [
        ("build", f"{info.VERSION}, {info.COMPILER}, {info.PLATFORM}"),
        ("built for", f"torch >= {info.TORCH_TARGET} (headers of {info.TORCH_HEADERS})"),
        ("CUDA", info.CUDA_VERSION or "none: CPU only"),
    ]
    if info.CUDA_VERSION:
        rows.append(("architectures", info.CUDA_ARCHITECTURES))
    try:
        importlib.import_module("lora_ext._library")
    except Exception as error:
        missing.append(f"the library does not load (see above): {REBUILD}")
        return [*rows, ("library", f"does not load: {error}")]
    return [*rows, ("library", "loads")]


def torch_rows(missing: list[str]) -> Section:
    try:
        torch = importlib.import_module("torch")
    except Exception as error:
        missing.append("torch 2.10 or newer: pip install torch")
        return [("version", version_of("torch") or "not installed"), ("import", str(error))]
    if version_tuple(torch.__version__) < MIN_TORCH:
        missing.append(f"torch 2.10 or newer, not {torch.__version__}: pip install -U torch")
    return [
        ("version", torch.__version__),
        ("CUDA", torch.version.cuda or "none: CPU only"),
        ("threads", str(torch.get_num_threads())),
        ("CPU capability", torch.backends.cpu.get_cpu_capability()),
    ]


def gpu_rows(missing: list[str]) -> Section:
    driver = output_of("nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader")
    rows = [("driver, name", driver or "no NVIDIA GPU: nvidia-smi is missing or finds none")]
    try:
        torch = importlib.import_module("torch")
    except Exception:
        return rows
    if not torch.cuda.is_available():
        if driver and not torch.version.cuda:
            missing.append("a CUDA build of torch: this one is CPU only, and there is a GPU")
        elif driver:
            missing.append(f"a driver that serves CUDA {torch.version.cuda}: torch finds no GPU")
        return [*rows, ("torch sees", "no GPU")]
    info = build_info()
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        sm = f"{device.major}.{device.minor}"
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        rows.append((f"cuda:{index}", f"{device.name}, compute capability {sm}, {memory}"))
        if info is not None and not covers(info.CUDA_ARCHITECTURES, device.major, device.minor):
            missing.append(
                f"kernels for cuda:{index}: TORCH_CUDA_ARCH_LIST={sm} {REBUILD}, with nvcc on PATH"
                " or CUDA_HOME set"
            )
    return rows


def covers(architectures: str, major: int, minor: int) -> bool:
    """Return whether kernels for ``architectures`` ("80;90a-real", CMake's terms) run on a GPU."""
    for entry in architectures.split(";"):
        match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", entry)
        if match is None:
            continue
        built = (int(match[1]), int(match[2]))
        if built == (major, minor) and match[4] != "-virtual":
            return True
        if match[3]:
            continue
        same_major = built[0] == major and built[1] <= minor and match[4] != "-virtual"
        has_ptx = match[4] != "-real" and built <= (major, minor)
        if same_major or has_ptx:
            return True
    return False


def system_rows(missing: list[str]) -> Section:
    return [
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("OS", f"{platform.platform()}, {' '.join(platform.libc_ver())}"),
        ("CPU", f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores usable"),
    ]


def tool_rows(missing: list[str]) -> Section:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or str(Path(home) / "bin" / "nvcc")
    return [
        ("nvcc", last_line(output_of(nvcc, "--version")) or "none (CPU-only builds)"),
        ("g++", first_line(output_of("g++", "--version")) or "none"),
        ("cmake", first_line(output_of("cmake", "--version")) or "none"),
        ("ninja", first_line(output_of("ninja", "--version")) or "none"),
    ]


def package_rows(missing: list[str]) -> Section:
    versions = {name: version_of(name) for name in PACKAGES}
    absent = [name for name, version in versions.items() if version is None]
    if absent:
        missing.append(
            f"{', '.join(absent)} (demo and generate need them): pip install {' '.join(absent)}"
        )
    return [(name, version or "not installed") for name, version in versions.items()]


def package_folder() -> Path:
    return Path(__file__).resolve().parent.parent


def build_info() -> Any | None:
    """Return lora_ext's _build_info module without importing lora_ext, or None where not built."""
    spec = importlib.util.spec_from_file_location(
        "_lora_ext_build_info", package_folder() / "_build_info.py"
    )
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError:
        return None
    return module


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_tuple(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def output_of(*command: str) -> str | None:
    """Return what ``command`` prints, or None where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def first_line(text: str | None) -> str | None:
    return text.splitlines()[0] if text else None


def last_line(text: str | None) -> str | None:
    return text.splitlines()[-1] if text else None


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else platform.machine()


if __name__ == "__main__":
    sys.exit(run(argparse.Namespace()))
