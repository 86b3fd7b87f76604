"""Times candidates of one problem side by side.

On a GPU a candidate's calls over all sets of data are captured in one CUDA graph, so that the host
plays no part and, there being more data than the L2 holds, every call finds it cold. The graphs are
replayed in turn, so that clocks and temperature are the same for all. On a CPU the calls are timed
as they are, in turn as well.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .case import Candidate

MIN_CALLS = 16
MIN_SAMPLE_MS = 2.0
MAX_SAMPLE_MS = 30.0
CPU_SAMPLE_MS = 10.0


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: the median over the replays, and the fastest one."""

    us: float
    best_us: float
    captured: bool


@dataclass(frozen=True)
class _Sampler:
    """Runs ``calls`` calls at a time; ``seconds`` times that."""

    seconds: Callable[[], float]
    calls: int
    captured: bool


def time_together(
    candidates: Mapping[str, Candidate], device: torch.device, replays: int
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time each candidate ``replays`` times, in turn.

    Returns:
        The timings, and for candidates that could not be timed why.
    """
    samplers: dict[str, _Sampler] = {}
    failures: dict[str, str] = {}
    for name, candidate in candidates.items():
        try:
            samplers[name] = _sampler(candidate, device)
        except RuntimeError as error:
            failures[name] = f"not timed: {str(error).strip().splitlines()[-1]}"
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for replay in range(replays):
        order = list(samplers) if replay % 2 == 0 else list(reversed(samplers))
        for name in order:
            samples[name].append(samplers[name].seconds() / samplers[name].calls * 1e6)
    timings = {
        name: Timing(statistics.median(values), min(values), samplers[name].captured)
        for name, values in samples.items()
    }
    return timings, failures


def _sampler(candidate: Candidate, device: torch.device) -> _Sampler:
    if device.type != "cuda":
        return _cpu_sampler(candidate)
    run, sets = candidate.run, candidate.num_sets
    # Some providers build tables when they first see a set: each is seen once before.
    warm = min(sets, 8)
    event_seconds(lambda: [run(i) for i in range(warm)])
    eager_ms = event_seconds(lambda: [run(i) for i in range(warm)]) * 1e3 / warm
    calls = sets * math.ceil(MIN_CALLS / sets)
    if eager_ms * calls > MAX_SAMPLE_MS:
        calls = max(2, min(calls, int(MAX_SAMPLE_MS / eager_ms)))
    for i in range(warm, min(sets, calls)):
        run(i)
    torch.cuda.synchronize()
    if not candidate.captured:
        return _Sampler(
            lambda: event_seconds(lambda: [run(i % sets) for i in range(calls)]), calls, False
        )
    graph = _capture(lambda: [run(i % sets) for i in range(calls)], device)
    graph.replay()
    once_ms = event_seconds(lambda: _replay(graph, 1)) * 1e3
    repeats = max(1, math.ceil(MIN_SAMPLE_MS / max(once_ms, 1e-3)))
    return _Sampler(lambda: event_seconds(lambda: _replay(graph, repeats)), calls * repeats, True)


def _cpu_sampler(candidate: Candidate) -> _Sampler:
    # Samples go on where the last one ended: also short ones get round all sets.
    sets = itertools.cycle(range(candidate.num_sets))

    def seconds(calls: int) -> float:
        chosen = list(itertools.islice(sets, calls))
        start = time.perf_counter()
        for i in chosen:
            candidate.run(i)
        return time.perf_counter() - start

    seconds(1)
    once_ms = max(seconds(1) * 1e3, 1e-4)
    calls = max(1, math.ceil(CPU_SAMPLE_MS / once_ms))
    return _Sampler(lambda: seconds(calls), calls, False)


def _capture(run: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    # Some providers have workspaces for each stream, which they do not make during a capture.
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    try:
        # The outer block brings the stream back where a failed capture does not.
        with (
            torch.cuda.stream(torch.cuda.current_stream(device)),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            run()
    except RuntimeError:
        _forget_capture(device, pool)
        raise
    return graph


def _forget_capture(device: torch.device, pool: Any) -> None:
    """Undo what a capture that failed half-way leaves behind."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):  # the allocator may be on the graph's pool
        torch._C._cuda_endAllocateToPool(index, pool)
    # The default generator may believe that it is being captured: a fresh state takes its place.
    state = torch.Generator(device=f"cuda:{index}").graphsafe_get_state()
    torch.cuda.default_generators[index].graphsafe_set_state(state)


def _replay(graph: torch.cuda.CUDAGraph, times: int) -> None:
    for _ in range(times):
        graph.replay()


def event_seconds(run: Callable[[], object]) -> float:
    """The time between two events around ``run`` on the current stream of the current GPU."""
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
