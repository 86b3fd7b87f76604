"""Experts divided among processes: a token has its own adapter, whatever slot that has where."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distributed import Workers, world
from generators import NAN
from lora_ext import AdapterPool, LoRABatch
from lora_ext.layers import ExpertParallel, FusedMoE
from test_moe_layers import NUM_SLOTS, TOLERANCES, E, Layer, adapter, routed, run
from tiny_models import tiny_model

# The same adapters everywhere, in other slots: what is slot 1 on rank 0 is another's on rank 1.
ORDERS = [["a", "b", "c"], ["placeholder", "c", "b", "a"]]
# Adapters of each rank's tokens: mixed, without any, none at all, one rank that is idle.
BATCHES: list[list[list[str | None]]] = [
    [["a", None, "b", "c", "c"], ["b", "a", "a", None, "c", "b", "a"]],
    [["a", "b", "c", None], [None] * 6],
    [[None] * 3, ["c"] * 3],
    [[], ["a", "b"]],
    [["b"] * 5, []],
    [[None] * 2, [None] * 4],
]


def adapters() -> dict[str, Any]:
    return {
        "a": adapter(3, 0),
        "b": adapter(8, 1, form="fused"),
        "c": adapter(1, 2),
        "placeholder": adapter(2, 3),
    }


def make(
    device: str, dtype: torch.dtype, max_tokens: int | None, order: Sequence[str]
) -> tuple[Layer, ExpertParallel]:
    """This process's part of a layer, with adapters that it has agreed on with the others."""
    parallel = ExpertParallel(world(), E, device, max_tokens=max_tokens)
    layer = Layer.make(device, dtype, expert_parallel=parallel)
    for name in order:
        layer.load(adapters()[name], name=name)
    if "placeholder" in order:
        layer.pool.remove("placeholder")
    parallel.agree(layer.pool)
    return layer, parallel


def slots_of(layer: Layer, names: Sequence[str | None]) -> list[int]:
    return [-1 if name is None else layer.pool.adapters[name].slot for name in names]


def check_agrees_with_one_process(device: str, dtype: torch.dtype, max_tokens: int | None) -> None:
    rank = dist.get_rank()
    layer, _ = make(device, dtype, max_tokens, ORDERS[rank])
    whole = Layer.make(device, dtype)
    for name in ("c", "a", "b"):
        whole.load(adapters()[name], name=name)
    assert {layer.pool.adapters[n].slot for n in "abc"} != {
        whole.pool.adapters[n].slot for n in "c"
    }
    for step, names in enumerate(BATCHES):
        mine = names[rank]
        batch = routed(len(mine), device, dtype, seed=(step, rank))
        ours = run(layer, slots_of(layer, mine), batch)
        slots = slots_of(whole, mine)
        alone, oracle = run(whole, slots, batch), whole.oracle(*batch, slots)
        assert ours.dtype == dtype and ours.shape == alone.shape
        scale = TOLERANCES[dtype] * oracle.norm()
        assert (ours.double().cpu() - oracle).norm() <= scale
        assert (ours - alone).double().norm() <= 2 * scale
    # Without routing, as if no token had an adapter.
    batch = routed(4, device, dtype, seed=rank)
    with torch.no_grad():
        ours, alone = layer.moe(*batch), whole.moe(*batch)
    assert (ours - alone).double().norm() <= 2 * TOLERANCES[dtype] * alone.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_tokens", [None, 9], ids=["counted", "filled up"])
def test_two_ranks_with_other_slots_agree_with_one_process(
    workers: Workers, dtype: torch.dtype, max_tokens: int | None
) -> None:
    workers.run(check_agrees_with_one_process, dtype, max_tokens)


def check_reload(device: str) -> None:
    """A name whose adapter, and slot, has changed: nothing is computed until all have agreed."""
    rank = dist.get_rank()
    layer, parallel = make(device, torch.float32, None, ORDERS[rank])
    batch = routed(4, device, torch.float32, seed=rank)
    names = ["a", "b", None, "a"]
    layer.pool.remove("a")
    layer.loaded.clear()
    if rank:
        layer.pool.remove("b")
        layer.load(adapters()["b"], name="b")  # in the slot that was a's
    layer.load(adapters()["placeholder"], name="a")
    with pytest.raises(RuntimeError, match=r"call ExpertParallel.agree on all of them"):
        run(layer, slots_of(layer, names), batch)
    parallel.agree(layer.pool)
    ours = run(layer, slots_of(layer, names), batch)
    whole = Layer.make(device)
    whole.load(adapters()["placeholder"], name="a")
    whole.load(adapters()["b"], name="b")
    oracle = whole.oracle(*batch, slots_of(whole, names))
    assert (ours.double().cpu() - oracle).norm() <= 2e-6 * oracle.norm()


def test_adapters_that_change_are_agreed_on_anew(workers: Workers) -> None:
    workers.run(check_reload)


def check_refusals(device: str) -> None:
    rank = dist.get_rank()
    layer, parallel = make(device, torch.float32, 6, ORDERS[rank])
    batch = routed(6, device, torch.float32)
    before = run(layer, slots_of(layer, ["a"] * 6), batch)
    if rank:
        layer.pool.load("extra", adapters()["a"])
    for _ in range(2):
        with pytest.raises(ValueError, match="'extra' is not loaded on rank 0, whose experts"):
            parallel.agree(layer.pool)
    if rank:
        layer.pool.remove("extra")
    layer.pool.load("c", adapters()["b" if rank else "c"], replace=True)
    with pytest.raises(ValueError, match=r"'c' is not the same one everywhere.*\(1, 3\), \(8, 2\)"):
        parallel.agree(layer.pool)
    layer.pool.load("c", adapters()["c"], replace=True)
    parallel.agree(layer.pool)
    assert torch.equal(run(layer, slots_of(layer, ["a"] * 6), batch), before)
    with pytest.raises(RuntimeError, match="the batch has 7 tokens, max_tokens is 6"):
        run(layer, [-1] * 7, routed(7, device, torch.float32))
    with pytest.raises(ValueError, match="num_experts is 5, which does not divide into 2"):
        ExpertParallel(world(), 5, device)
    with pytest.raises(RuntimeError, match="agree"):
        fresh = Layer.make(device, expert_parallel=ExpertParallel(world(), E, device))
        run(fresh, [-1], routed(1, device, torch.float32))


def test_what_cannot_agree_is_refused_on_all_ranks(workers: Workers) -> None:
    workers.run(check_refusals)


def check_hugging_face(device: str) -> None:
    """The experts of a real model: cut from the whole module."""
    experts = tiny_model("qwen3_moe", device).model.layers[0].mlp.experts
    parallel = ExpertParallel(world(), E, device)
    moe = FusedMoE.from_experts(copy.deepcopy(experts), NUM_SLOTS, 4, expert_parallel=parallel)
    assert moe.gate_up.base.weight.shape == (E // 2, *experts.gate_up_proj.shape[1:])
    parallel.agree(AdapterPool(moe.targets))
    n = 3 + dist.get_rank()
    x = torch.randn(n, 64, device=device)
    ids = torch.rand(n, E, device=device).topk(2).indices
    weights = torch.rand(n, 2, device=device)
    with torch.no_grad():
        torch.testing.assert_close(moe(x, ids, weights), experts(x, ids, weights))


def test_experts_of_a_hugging_face_model(workers: Workers) -> None:
    workers.run(check_hugging_face)


def check_captured(device: str) -> None:
    """One graph on each rank, for every later batch; adapters change slots in between."""
    rank, num_tokens = dist.get_rank(), 7
    layer, parallel = make(device, torch.bfloat16, num_tokens, ORDERS[rank])
    plan = LoRABatch.for_cuda_graph(num_tokens, NUM_SLOTS, device)
    static = routed(num_tokens, device, torch.bfloat16)
    with layer.moe.routing.using(plan), torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(2):
                layer.moe(*static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer.moe(*static)
    whole = Layer.make(device, torch.bfloat16)
    for name in "abc":
        whole.load(adapters()[name], name=name)
    for step, names in enumerate([*BATCHES, *BATCHES]):
        if step == len(BATCHES):
            layer.pool.remove("b")
            layer.pool.remove("a")
            for name in "ab" if rank else "ba":
                layer.pool.load(name, adapters()[name])
            parallel.agree(layer.pool)
        mine = names[rank]
        batch = routed(num_tokens, device, torch.bfloat16, seed=(step, rank))
        for into, values in zip(static, batch, strict=True):
            into.copy_(values)
        plan.update(slots_of(layer, mine))
        y.fill_(NAN)
        graph.replay()
        n = len(mine)
        wanted = whole.oracle(*(values[:n] for values in batch), slots_of(whole, mine))
        error = (y[:n].double().cpu() - wanted).norm()
        assert error <= TOLERANCES[torch.bfloat16] * max(1.0, float(wanted.norm()))


def test_captured(workers: Workers) -> None:
    if workers.device == "cpu":
        pytest.skip("there are no graphs on the CPU")
    workers.run(check_captured)
