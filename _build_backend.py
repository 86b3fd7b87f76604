"""PEP 517 backend: setuptools, plus torch as a build requirement only where none is installed.

The library is compiled against torch's headers and linked with one of its libraries, but a wheel
built against one torch serves them all (stable ABI). A fixed build requirement would make pip
download a second torch, several gigabytes, into its isolated build environment each time.
"""

from __future__ import annotations

import site
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
    "find_torch",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

TESTED_TORCH = "torch==2.13.0"


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


def _requirements(from_setuptools: list[str]) -> list[str]:
    return from_setuptools if find_torch() else [*from_setuptools, TESTED_TORCH]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Return what a wheel build needs beyond ``build-system.requires``."""
    return _requirements(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Return what an editable build needs beyond ``build-system.requires``."""
    return _requirements(build_meta.get_requires_for_build_editable(config_settings))
