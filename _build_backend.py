"""PEP 517 backend: setuptools, plus torch as a build requirement only where none is installed.

Also what setup.py asks of the environment: where torch and nvcc are, what to compile for.

The library is compiled against torch's headers and linked with one of its libraries, but a wheel
built against one torch serves them all (stable ABI). A fixed build requirement would make pip
download a second torch, several gigabytes, into its isolated build environment each time.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "cuda_architectures",
    "find_nvcc",
    "find_torch",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

TESTED_TORCH = "torch==2.13.0"
MIN_NVCC = (12, 4)
# The PTX of 8.0 serves GPUs that are newer than the toolkit, through the driver's compiler.
DEFAULT_ARCH_LIST = "8.0+PTX;9.0a"


def find_torch() -> Path | None:
    """Return the directory of the installed torch, without importing it, or None.

    Build isolation takes the environment's site-packages off ``sys.path``, but ``sys.prefix``, and
    so ``site`` and ``sysconfig``, still point at them. They come first: that torch, rather than one
    fetched for the build, is the one that will load the library.
    """
    places = [*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("platlib")]
    for place in [*places, *sys.path]:
        torch = Path(place) / "torch"
        if (torch / "lib" / "libtorch.so").exists():
            return torch
    return None


def find_nvcc() -> Path | None:
    """Return the nvcc to build with, or None for a CPU-only build."""
    if os.environ.get("LORA_EXT_NO_CUDA") == "1":
        print("lora_ext: CPU-only build, because LORA_EXT_NO_CUDA=1")
        return None
    cuda_home = os.environ.get("CUDA_HOME")
    on_path = shutil.which("nvcc")
    if cuda_home:
        nvcc = Path(cuda_home) / "bin" / "nvcc"
    elif on_path:
        nvcc = Path(on_path)
    else:
        nvcc = Path("/usr/local/cuda/bin/nvcc")
    if not nvcc.exists():
        if cuda_home:
            raise RuntimeError(f"CUDA_HOME={cuda_home} has no bin/nvcc")
        print("lora_ext: CPU-only build, because no nvcc was found; set CUDA_HOME to name one")
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None:
        raise RuntimeError(f"{nvcc} --version names no release:\n{text}")
    version = (int(release[1]), int(release[2]))
    if version < MIN_NVCC:
        raise RuntimeError(
            f"{nvcc} is CUDA {version[0]}.{version[1]}; lora_ext needs {MIN_NVCC[0]}.{MIN_NVCC[1]} "
            "or newer. LORA_EXT_NO_CUDA=1 builds for the CPU only"
        )
    return nvcc


def cuda_architectures() -> str:
    """Return TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX") in CMake's terms ("80-real;90a")."""
    arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCH_LIST
    architectures = []
    for arch in re.split(r"[;,\s]+", arch_list.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", arch)
        if match is None:
            raise RuntimeError(
                f"TORCH_CUDA_ARCH_LIST has {arch!r}; expected numbers such as 8.0, 9.0a or 9.0+PTX"
            )
        architectures.append(match[1] + match[2] + ("" if match[3] else "-real"))
    return ";".join(architectures)


def _requirements(from_setuptools: list[str]) -> list[str]:
    return from_setuptools if find_torch() else [*from_setuptools, TESTED_TORCH]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Return what a wheel build needs beyond ``build-system.requires``."""
    return _requirements(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Return what an editable build needs beyond ``build-system.requires``."""
    return _requirements(build_meta.get_requires_for_build_editable(config_settings))
