"""Loads the library of operators on import, and says what it was built for where that fails."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import Any

import torch

try:
    from . import _build_info
except ImportError as error:
    raise ImportError(
        "lora_ext is not built here: run `pip install .` or `pip install -e .` in its source tree"
    ) from error

LIBRARY = Path(__file__).with_name("_C.so")


def describe_build() -> str:
    """Return in one line what the library was built for."""
    cuda = "CPU only"
    if _build_info.CUDA_VERSION:
        cuda = f"CUDA {_build_info.CUDA_VERSION} for {_build_info.CUDA_ARCHITECTURES}"
    return (
        f"lora_ext {_build_info.VERSION} for torch >= {_build_info.TORCH_TARGET} (headers of "
        f"{_build_info.TORCH_HEADERS}), {cuda}, {_build_info.PLATFORM}, {_build_info.COMPILER}"
    )


def describe_running() -> str:
    """Return in one line what the library is running on, without initialising CUDA."""
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return (
        f"torch {torch.__version__} {cuda}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}"
    )


def load(library: Path = LIBRARY) -> None:
    """Load ``library``, which registers ``torch.ops.lora_ext.*``; a second time does nothing.

    Raises:
        ImportError: it cannot be loaded; the message names the cause, what the library was built
            for, and what is running.
    """
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as error:
        raise ImportError(
            f"cannot load {library}: {error.__cause__ or error}\n"
            f"  built for: {describe_build()}\n"
            f"  running:   {describe_running()}"
        ) from error


def function(name: str, result: Any, *arguments: Any) -> Any:
    """Return a C function of the loaded library, by the ctypes types of its result and arguments.

    Its call costs the host a microsecond, that of an operator four or five.
    """
    found = getattr(ctypes.CDLL(str(LIBRARY)), name)
    found.restype, found.argtypes = result, arguments
    return found


load()
