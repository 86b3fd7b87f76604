"""Processes that hold a tensor-parallel group together and run what the tests give them.

gloo on the CPU, NCCL with a GPU for each process: the tests are the same.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lora_ext.layers import sharding

WORLD_SIZE = 2
_LIMIT_S = 180.0  # for one call
_COLLECTIVE_LIMIT_S = 60
_OTHERS_LIMIT_S = 5.0  # for the other ranks, once one has failed: they may wait for it


class Workers:
    """The processes; ``run`` calls a function of a test module on each, with its device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._pipes: list[Connection] = []
        self._processes: list[SpawnProcess] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def run(self, function: Callable[..., None], *args: Any) -> None:
        """Call ``function(device, *args)`` in each process; fails with what any of them raised."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        failures: list[str] = []
        for rank, pipe in enumerate(self._pipes):
            try:
                answered = pipe.poll(_OTHERS_LIMIT_S if failures else _LIMIT_S)
                failure = pipe.recv() if answered else "no answer"
            except EOFError:
                failure = "the process ended"
            if failure is not None:
                failures.append(f"rank {rank}: {failure}")
        if failures:
            self._stop()  # the next call gets new ones
            pytest.fail("\n".join(failures), pytrace=False)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        # A new file each time, so that nothing of an earlier group is met in it.
        self._directory = tempfile.TemporaryDirectory(prefix="lora-ext-ranks-")
        store = Path(self._directory.name, "store").as_uri()
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.device, store), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def _stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(_OTHERS_LIMIT_S)
            process.kill()
            process.join()
        if self._processes:
            self._directory.cleanup()
        self._pipes, self._processes = [], []


def world() -> dist.ProcessGroup | None:
    """The group of all processes where one of them asks; None elsewhere."""
    return dist.group.WORLD if dist.is_initialized() else None


@contextmanager
def watched() -> Iterator[list[tuple[str, Tensor]]]:
    """Record what collectives get; meanwhile memory that nobody has written is NaN."""
    seen: list[tuple[str, Tensor]] = []
    all_reduce, all_gather = dist.all_reduce, sharding._all_gather

    def record_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(("all_reduce", tensor.clone()))
        return all_reduce(tensor, *args, **kwargs)

    def record_gather(output: Tensor, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(("all_gather", tensor.clone()))
        return all_gather(output, tensor, *args, **kwargs)

    dist.all_reduce, sharding._all_gather = record_reduce, record_gather
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns
    try:
        assert torch.empty(3).isnan().all()
        yield seen
    finally:
        torch.use_deterministic_algorithms(False)
        dist.all_reduce, sharding._all_gather = all_reduce, all_gather


def _serve(pipe: Connection, rank: int, device: str, store: str) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        device = f"cuda:{rank}"
        torch.cuda.set_device(device)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name need not resolve
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        init_method=store,
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=_COLLECTIVE_LIMIT_S),
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            break
        try:
            function(device, *args)
            pipe.send(None)
        except BaseException:
            pipe.send(traceback.format_exc())
    dist.destroy_process_group()
