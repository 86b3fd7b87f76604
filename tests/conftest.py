"""What all tests share: the ``gpu`` marker skips, by name, where its tests cannot run."""

from __future__ import annotations

import pytest
import torch

from lora_ext import _build_info


def why_no_gpu() -> str | None:
    """Return why the tests marked ``gpu`` cannot run here, or None where they can."""
    if not torch.cuda.is_available():
        return "needs a GPU: torch.cuda.is_available() is False"
    if not _build_info.CUDA_VERSION:
        return "needs the CUDA kernels: lora_ext was built for the CPU only"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_no_gpu()
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
