"""Lists of problems: those that the project's results are stated on, and one small one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

from .case import Problem
from .dense import APPLY, EXPAND, SHRINK, DenseProblem
from .embedding import EmbeddingProblem
from .moe import ALIGN, W2, W13, MoeProblem
from .planning import PlanProblem
from .registry import MODELS
from .workload import Workload, make_workload

LLAMA = MODELS["llama-3-8b"]
MAX_ADAPTERS = 32


def decode(op: str = APPLY) -> list[Problem]:
    """Llama-3-8B's qkv and down; 1 to 256 tokens; one adapter, distinct ones, a Zipf mix."""
    problems: list[Problem] = []
    for site, rank, tokens in product(("qkv", "down"), ("16", "64", "mixed"), (1, 8, 32, 128, 256)):
        mixes = [("even", 1), ("even", min(tokens, MAX_ADAPTERS)), ("zipf", MAX_ADAPTERS)]
        for mix, adapters in mixes[: 1 if tokens == 1 else None]:
            workload = make_workload(tokens, adapters, rank, mix)
            problems.append(DenseProblem("decode", LLAMA.sites[site], workload, op))
    return problems


def prefill(op: str = APPLY) -> list[Problem]:
    """Llama-3-8B's qkv and down; 512 to 8192 tokens in 1, 4 or 16 runs."""
    return [
        DenseProblem("prefill", LLAMA.sites[site], make_workload(tokens, n, rank, "segments"), op)
        for site, rank, tokens, n in product(
            ("qkv", "down"), ("16", "64"), (512, 2048, 8192), (1, 4, 16)
        )
    ]


def cpu_decode() -> list[Problem]:
    """Llama-3-8B's qkv and down; batches that mix adapters, as a CPU serves them."""
    batches = [(4, 4, "even"), (8, 8, "even"), (16, 8, "zipf"), (32, 8, "zipf"), (32, 32, "even")]
    return [
        DenseProblem("cpu decode", LLAMA.sites[site], make_workload(tokens, adapters, rank, mix))
        for site, rank, (tokens, adapters, mix) in product(
            ("qkv", "down"), ("16", "64", "mixed"), batches
        )
    ]


def embed() -> list[Problem]:
    """Llama-3-8B's embedding; 1 to 8192 tokens over 8 adapters."""
    return [
        EmbeddingProblem(
            "embed",
            LLAMA.vocab_size,
            LLAMA.hidden_size,
            make_workload(tokens, 8, rank, "even" if tokens <= 256 else "segments"),
        )
        for rank, tokens in product(("16", "64"), (1, 32, 256, 2048, 8192))
    ]


def moe() -> list[Problem]:
    """w13, w2 and the routing of Qwen3-30B-A3B and Mixtral; 1 to 2048 tokens."""
    return list(_moe())


def _moe() -> Iterator[Problem]:
    batches = [("qwen3-30b-a3b", rank, mix) for rank in ("16", "64") for mix in ("even", "zipf")]
    for name, rank, mix in [*batches, ("mixtral-8x7b", "16", "zipf")]:
        experts = MODELS[name].experts
        assert experts is not None
        for tokens in (1, 8, 32, 128, 512, 2048):
            if tokens == 1 and mix == "zipf" and name != "mixtral-8x7b":
                continue
            workload = make_workload(tokens, 1 if mix == "even" else 8, rank, mix)
            for stage in (W13, W2, *((ALIGN,) if rank == "16" else ())):
                yield MoeProblem("moe", name, experts, workload, stage)


def plan() -> list[Problem]:
    """The batch plan of 1 to 4096 requests, and of a few long ones."""
    batches: list[Workload] = [
        make_workload(tokens, min(tokens, adapters), "16", "even")
        for tokens, adapters in ((1, 1), (32, 32), (256, 32), (4096, 256))
    ]
    batches += [make_workload(tokens, 16, "16", "segments") for tokens in (512, 8192, 16384)]
    return [PlanProblem("plan", batch) for batch in batches]


def smoke() -> list[Problem]:
    """One small problem of each kind, for a test on any machine."""
    tiny, experts = MODELS["tiny"], MODELS["tiny-moe"].experts
    assert experts is not None
    mixed = make_workload(20, 4, "mixed", "zipf")
    runs = make_workload(70, 3, "16", "segments")
    return [
        DenseProblem("decode", tiny.sites["qkv"], mixed),
        DenseProblem("prefill", tiny.sites["gate_up"], runs),
        DenseProblem("shrink", tiny.sites["down"], mixed, SHRINK),
        DenseProblem("expand", tiny.sites["down"], mixed, EXPAND),
        EmbeddingProblem("embed", tiny.vocab_size, tiny.hidden_size, mixed),
        PlanProblem("plan", runs),
        *(MoeProblem("moe", "tiny-moe", experts, mixed, stage) for stage in (W13, W2, ALIGN)),
    ]


GRIDS: dict[str, Callable[[], list[Problem]]] = {
    "decode": decode,
    "prefill": prefill,
    "embed": embed,
    "moe": moe,
    "plan": plan,
    "smoke": smoke,
}
