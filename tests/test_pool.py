"""AdapterPool: adapters by name in the slots of layers; errors leave everything as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from generators import on_devices
from lora_ext import Adapter, AdapterError, AdapterPool
from lora_ext.adapters import LoRAWeights
from lora_ext.layers import LoRAEmbedding, LoRALinear, LoRAModule

MAX_ADAPTERS = 3
MAX_RANK = 4


def make_layers(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, LoRAModule]:
    torch.manual_seed(0)
    up = nn.Linear(8, 12).to(device, dtype)
    down = nn.Linear(12, 8).to(device, dtype)
    embedding = nn.Embedding(20, 8).to(device, dtype)
    return {
        "up": LoRALinear(up, MAX_ADAPTERS, MAX_RANK),
        "down": LoRALinear(down, MAX_ADAPTERS, MAX_RANK),
        "embedding": LoRAEmbedding(embedding, MAX_ADAPTERS, MAX_RANK),
    }


def weights(
    in_features: int, out_features: int, rank: int, value: float = 1.0, **kwargs: Any
) -> LoRAWeights:
    lora_a = torch.full((rank, in_features), value)
    lora_b = torch.full((out_features, rank), value)
    return LoRAWeights(lora_a, lora_b, rank, value / rank, **kwargs)


def make_adapter(rank: int = 2, value: float = 1.0) -> Adapter:
    return Adapter({"up": weights(8, 12, rank, value), "down": weights(12, 8, rank, value)})


def state(layers: Mapping[str, LoRAModule]) -> list[Tensor]:
    return [
        tensor.clone()
        for layer in layers.values()
        for tensor in (layer.lora_a, layer.lora_b, layer.ranks, layer.scalings)
    ]


def addresses(layers: Mapping[str, LoRAModule]) -> list[int]:
    return [buffer.data_ptr() for layer in layers.values() for buffer in layer.buffers()]


@on_devices
def test_load_writes_the_slot_of_every_module(device: str) -> None:
    layers = make_layers(device)
    pool = AdapterPool(layers)
    before = addresses(layers)
    up, embedding = weights(8, 12, 3, 0.5), weights(20, 8, 1, 2.0, is_embedding=True)
    up.lora_a.uniform_()
    embedding.lora_a.uniform_()

    assert pool.load("first", make_adapter()) == 0
    slot = pool.load("second", Adapter({"up": up, "embedding": embedding}))

    assert slot == 1 and len(pool) == 2 and "second" in pool
    layer = layers["up"]
    assert torch.equal(layer.lora_a[slot, :3].cpu(), up.lora_a)
    assert torch.equal(layer.lora_b[slot, :, :3].cpu(), up.lora_b)
    assert layer.ranks.tolist() == [2, 3, 0]
    assert layer.scalings.tolist() == pytest.approx([0.5, 0.5 / 3, 0.0])
    assert layers["down"].ranks.tolist() == [2, 0, 0]
    table = layers["embedding"]
    assert torch.equal(table.lora_a[slot, :, :1].cpu(), embedding.lora_a.T)
    assert table.ranks.tolist() == [0, 1, 0]
    assert addresses(layers) == before


def test_loading_the_same_adapter_twice_is_the_same() -> None:
    """A scaling that is multiplied into the weights would count twice."""
    layers = make_layers()
    pool = AdapterPool(layers)
    adapter = make_adapter(value=3.0)
    pool.load("a", adapter)
    once = state(layers)
    pool.load("a", adapter, replace=True)
    assert all(map(torch.equal, once, state(layers)))
    pool.load("b", adapter)
    assert torch.equal(layers["up"].lora_b[0], layers["up"].lora_b[1])


def test_replace_keeps_the_slot_and_drops_modules_that_are_gone() -> None:
    layers = make_layers()
    pool = AdapterPool(layers)
    pool.load("other", make_adapter())
    pool.load("a", make_adapter(rank=4))
    with pytest.raises(ValueError, match="'a' is loaded already; replace=True"):
        pool.load("a", make_adapter())
    assert pool.load("a", Adapter({"up": weights(8, 12, 1)}), replace=True) == 1
    assert layers["up"].ranks.tolist() == [2, 1, 0]
    assert layers["down"].ranks.tolist() == [2, 0, 0]
    assert pool.adapters["a"].num_modules == 1
    assert pool.load("new", make_adapter(), replace=True) == 2


def test_remove_frees_the_slot() -> None:
    layers = make_layers()
    pool = AdapterPool(layers)
    for name in ("a", "b"):
        pool.load(name, make_adapter())
    pool.remove("a")
    assert "a" not in pool and layers["up"].ranks.tolist() == [0, 2, 0]
    with pytest.raises(KeyError, match="no adapter named 'a' is loaded; loaded: 'b'"):
        pool.remove("a")
    assert pool.load("c", make_adapter()) == 0


def test_a_full_pool_raises() -> None:
    layers = make_layers()
    pool = AdapterPool(layers)
    for name in "abc":
        pool.load(name, make_adapter())
    before = state(layers)
    with pytest.raises(RuntimeError, match="all 3 slots are taken, by 'a', 'b', 'c'"):
        pool.load("d", make_adapter())
    assert all(map(torch.equal, before, state(layers)))
    assert list(pool.adapters) == ["a", "b", "c"]


def test_eviction_takes_the_one_unused_for_longest() -> None:
    pool = AdapterPool(make_layers(), evict_lru=True)
    for name in "abc":
        pool.load(name, make_adapter())
    with pool.using(["a", None, "a"]) as slots:
        assert slots == [0, -1, 0]
    assert pool.load("d", make_adapter()) == 1
    assert list(pool.adapters) == ["a", "c", "d"]
    with pool.using(["c", "a"]):
        assert pool.load("e", make_adapter()) == 1  # d, though it was used last
        with pool.using(["e"]), pytest.raises(RuntimeError, match="all of them are in use"):
            pool.load("f", make_adapter())
    assert list(pool.adapters) == ["a", "c", "e"]


def test_an_adapter_in_use_stays_until_every_batch_is_done() -> None:
    pool = AdapterPool(make_layers())
    pool.load("a", make_adapter())
    with pool.using(["a"]):
        with pool.using(["a", "a"]):
            pass
        assert pool.adapters["a"].in_use
        with pytest.raises(RuntimeError, match="in use by a running batch"):
            pool.remove("a")
        pool.load("a", make_adapter(rank=1), replace=True)
        assert pool.adapters["a"].in_use
    info = pool.adapters["a"]
    assert (info.in_use, info.num_batches, info.num_rows, info.rank) == (False, 2, 3, 1)
    with pytest.raises(ZeroDivisionError), pool.using(["a"]):
        _ = 1 / 0
    pool.remove("a")


def test_an_unknown_name_marks_nothing_as_used() -> None:
    pool = AdapterPool(make_layers())
    pool.load("a", make_adapter())
    with pytest.raises(KeyError, match="'b' is loaded; loaded: 'a'"), pool.using(["a", "b"]):
        pass
    assert not pool.adapters["a"].in_use and pool.adapters["a"].num_batches == 0


def with_base_weight(name: str, tensor: Tensor) -> Adapter:
    return Adapter(make_adapter().modules, base_weights={name: tensor})


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Adapter({"up": weights(9, 12, 2)}), r"'up': A is \[2, 9\], the model needs \[2, 8\]"),
        (Adapter({"up": weights(8, 13, 2)}), r"'up': B is \[13, 2\], the model needs \[12, 2\]"),
        (Adapter({"up": weights(8, 12, 5)}), "'up': its rank is 5, max_rank is 4"),
        (Adapter({"side": weights(8, 12, 2)}), "'side': the model has no layer of this name"),
        (Adapter({"up": weights(8, 12, 2, is_embedding=True)}), "weights are for an embedding"),
        (Adapter({"embedding": weights(20, 8, 2)}), "weights are for a linear layer"),
        (Adapter({"up": weights(8, 12, 2), "down": weights(8, 12, 2)}), "'down': A is"),
        (with_base_weight("embedding", torch.ones(20, 8)), "its own base weight .*'embedding'"),
        (with_base_weight("embedding", torch.ones(22, 8)), r"base weight \[22, 8\]"),
        (with_base_weight("norm", torch.ones(8)), "its own base weight .* for 'norm'"),
    ],
)
@pytest.mark.parametrize("replace", [False, True])
def test_what_does_not_fit_leaves_the_pool(adapter: Adapter, message: str, replace: bool) -> None:
    layers = make_layers()
    pool = AdapterPool(layers, evict_lru=True)
    for name in "abc":
        pool.load(name, make_adapter(value=2.0))
    before, infos = state(layers), pool.adapters
    with pytest.raises(AdapterError, match=message):
        pool.load("a" if replace else "new", adapter, replace=replace)
    assert all(map(torch.equal, before, state(layers)))
    assert pool.adapters == infos


def test_values_too_large_for_float16() -> None:
    layers = make_layers(dtype=torch.float16)
    pool = AdapterPool(layers)
    before = state(layers)
    with pytest.raises(AdapterError, match="A has values too large for the model's float16"):
        pool.load("a", make_adapter(value=1e5))
    assert all(map(torch.equal, before, state(layers))) and len(pool) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_models_own_base_weight_is_no_hindrance(
    dtype: torch.dtype, stored: torch.dtype
) -> None:
    layers = make_layers(dtype=dtype)
    table = layers["embedding"].weight.detach().to(stored)
    AdapterPool(layers).load("a", with_base_weight("embedding", table))


def test_a_device_that_fails_while_writing_leaves_no_half_adapter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = make_layers()
    pool = AdapterPool(layers)
    pool.load("a", make_adapter())
    seen = []

    def fail(*_: object) -> None:
        seen.append([layer.ranks.tolist() for layer in layers.values()])
        raise RuntimeError("out of order")

    monkeypatch.setattr(layers["down"], "write_shard", fail)
    for name in ("a", "b"):
        with pytest.raises(RuntimeError, match="out of order"):
            pool.load(name, make_adapter(), replace=True)
    assert seen == [[[0, 0, 0]] * 3] * 2  # nothing of a slot is in force while it is written
    assert [layer.ranks.tolist() for layer in layers.values()] == [[0, 0, 0]] * 3
    assert pool.adapters["a"].num_modules == 0 and "b" not in pool


@pytest.mark.parametrize("name", ["", None, 3])
def test_names(name: Any) -> None:
    with pytest.raises(ValueError, match="must be a non-empty string"):
        AdapterPool(make_layers()).load(name, make_adapter())


def test_layers_must_agree() -> None:
    odd = LoRALinear(nn.Linear(8, 8), MAX_ADAPTERS, MAX_RANK + 1)
    with pytest.raises(ValueError, match=r"\[\(3, 4\), \(3, 5\)\]"):
        AdapterPool({**make_layers(), "odd": odd})
    with pytest.raises(ValueError, match="no layers"):
        AdapterPool({})


def test_a_layer_needs_weights_of_a_known_dtype() -> None:
    quantised = nn.Linear(8, 8)
    quantised.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"Linear has weights of torch\.int8"):
        LoRALinear(quantised, 1, 4)
