"""Host time to prepare a batch: `LoRABatch.update`, and `LoRABackend.prepare_lora_batch` over it.

Each is called as an engine calls it, once per forward pass, from what the engine has: lists, numpy
arrays, or tensors (pinned on a GPU). The device is idle before every few calls, so that its own
time is not counted; the median of the calls is.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_ext import LoRABackend, LoRABatch
from lora_ext.backend import ForwardBatch

NUM_SLOTS = 32
CALLS_PER_WAIT = 4  # fewer than the staging buffers, so that none is waited for
Forms = dict[str, Callable[[list[int]], Any]]


def forms(device: str) -> Forms:
    """How an engine may hold whole numbers."""
    made: Forms = {
        "list": list,
        "numpy int64": lambda values: np.array(values, np.int64),
        "tensor int32": lambda values: torch.tensor(values, dtype=torch.int32),
    }
    if device != "cpu":
        made["pinned int32"] = lambda values: torch.tensor(values, dtype=torch.int32).pin_memory()
    return made


def calls(device: str, requests: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and call of each problem."""
    slots, lens = [i % NUM_SLOTS for i in range(requests)], [2] * requests
    batch = LoRABatch(2 * requests, NUM_SLOTS, device)
    for name, make in forms(device).items():
        own_slots, own_lens = make(slots), make(lens)
        yield f"update, slots: {name}", lambda s=own_slots: batch.update(s)
        yield (
            f"update, slots and lengths: {name}",
            lambda s=own_slots, n=own_lens: batch.update(s, seg_lens=n),
        )
    backend = LoRABackend(NUM_SLOTS, device)
    backend.init_decode_cuda_graph_batch_info(max_bs_in_cuda_graph=requests, num_tokens_per_req=1)
    decode, ranks, scalings = ForwardBatch.decode(requests), [16] * NUM_SLOTS, [2.0] * NUM_SLOTS
    yield (
        "prepare_lora_batch, decode: list",
        lambda: backend.prepare_lora_batch(decode, slots, ranks, scalings, True),
    )


def median_us(call: Callable[[], None], device: str, samples: int) -> float:
    """Median time of a call on the host."""
    times = []
    for _ in range(1 + samples // CALLS_PER_WAIT):
        if device != "cpu":
            torch.cuda.synchronize()
        for _ in range(CALLS_PER_WAIT):
            start = time.perf_counter_ns()
            call()
            times.append(time.perf_counter_ns() - start)
    return statistics.median(times[CALLS_PER_WAIT:]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--requests", default="1,16,256,1024,4096", help="comma-separated")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.requests.split(",")]
    results: dict[str, dict[int, float]] = {}
    for requests in counts:
        for name, call in calls(arguments.device, requests):
            us = median_us(call, arguments.device, arguments.samples)
            results.setdefault(name, {})[requests] = us
    print("µs on the host | " + " | ".join(f"{count} requests" for count in counts))
    for name, row in results.items():
        print(f"{name} | " + " | ".join(f"{row[count]:.1f}" for count in counts))
    if arguments.json is not None:
        machine = {"torch": torch.__version__, "python": platform.python_version()}
        machine["device"] = arguments.device
        if arguments.device != "cpu":
            machine["device"] = torch.cuda.get_device_name()
        arguments.json.write_text(json.dumps({"machine": machine, "median_us": results}, indent=1))


if __name__ == "__main__":
    main()
