"""What all tests share: skips of the ``gpu`` marker, by name; processes that work together."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch._functorch.config as functorch_config

from distributed import WORLD_SIZE, Workers
from lora_ext import _build_info


def why_no_gpu() -> str | None:
    """Return why the tests marked ``gpu`` cannot run here, or None where they can."""
    if not torch.cuda.is_available():
        return "needs a GPU: torch.cuda.is_available() is False"
    if not _build_info.CUDA_VERSION:
        return "needs the CUDA kernels: lora_ext was built for the CPU only"
    return None


def pytest_configure() -> None:
    # Processes that run tests beside each other (pytest-xdist) share the cores: with as many
    # threads each as there are cores, they wait for each other more than they work.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    # What another process has compiled would bring guards for the sizes that it saw first, and a
    # recompile where a test says that there is none.
    functorch_config.enable_autograd_cache = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_no_gpu()
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


_NEEDS_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < WORLD_SIZE, reason=f"needs {WORLD_SIZE} GPUs"),
]


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=_NEEDS_GPUS)])
def workers(request: pytest.FixtureRequest) -> Iterator[Workers]:
    """The processes of a tensor-parallel group, started when first used."""
    with Workers(request.param) as workers:
        yield workers
