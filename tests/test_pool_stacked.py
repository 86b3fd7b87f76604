"""AdapterPool over stacked and sharded layers: projections by their names, added tokens, ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed import Workers, world
from generators import NAN, generator
from lora_ext import Adapter, AdapterError, AdapterPool, LoRABatch
from lora_ext.adapters import LoRAWeights
from lora_ext.layers import (
    LoRAColumnParallelLinear,
    LoRALMHead,
    LoRAModule,
    LoRARowParallelLinear,
    LoRAVocabParallelEmbedding,
    Routing,
)

MAX_RANK = 8
SIZES = {"q": 12, "k": 4, "v": 4}
VOCABULARY = 40
WIDTH = 16


def weights(
    in_features: int, out_features: int, rank: int, scaling: float, seed: object, **kind: bool
) -> LoRAWeights:
    gen = generator(seed)
    lora_a = torch.randn(rank, in_features, generator=gen)
    lora_b = torch.randn(out_features, rank, generator=gen)
    return LoRAWeights(lora_a, lora_b, rank, scaling, **kind)


def delta(weights: LoRAWeights) -> Tensor:
    return weights.scaling * weights.lora_b.double() @ weights.lora_a.double()


def qkv_layer(dtype: torch.dtype = torch.float32) -> LoRAColumnParallelLinear:
    torch.manual_seed(0)
    base = nn.Linear(WIDTH, sum(SIZES.values()), dtype=dtype)
    layer = LoRAColumnParallelLinear(base, 3, MAX_RANK, output_sizes=list(SIZES.values()))
    layer.lora_a.fill_(NAN)
    layer.lora_b.fill_(NAN)
    return layer


def outputs(layer: LoRAModule, slots: list[int], x: Tensor) -> Tensor:
    batch = LoRABatch(64, layer.num_slots)
    batch.update(slots)
    with layer.routing.using(batch), torch.no_grad():
        y: Tensor = layer(x)
    return y


def test_projections_of_a_stack_have_their_own_ranks_and_scalings() -> None:
    layer = qkv_layer()
    q, k, v = layer.slices
    pool = AdapterPool({"q": q, "k": k, "v": v, "qkv": layer})
    adapters = {
        "all": {"q": (2, 0.5), "k": (2, 0.5), "v": (2, 0.5)},
        "patterns": {"v": (1, -3.0), "q": (8, 0.25), "k": (5, 0.0)},
        "q alone": {"q": (3, 2.0)},
    }
    deltas = torch.zeros(4, sum(SIZES.values()), WIDTH, dtype=torch.float64)
    for name, modules in adapters.items():
        parts = {m: weights(WIDTH, SIZES[m], r, s, (name, m)) for m, (r, s) in modules.items()}
        slot = pool.load(name, Adapter(parts))
        empty = {m: torch.zeros(n, WIDTH, dtype=torch.float64) for m, n in SIZES.items()}
        deltas[slot] = torch.cat([delta(parts[m]) if m in parts else empty[m] for m in SIZES])
        assert pool.adapters[name].num_modules == len(modules)
        assert pool.adapters[name].rank == max(r for r, _ in modules.values())
    slots = [1, 0, 2, -1, 1, 0]
    x = torch.randn(len(slots), WIDTH)
    with torch.no_grad():
        base = layer.base(x)
    wanted = base.double() + torch.einsum("tk,tnk->tn", x.double(), deltas[slots])
    torch.testing.assert_close(outputs(layer, slots, x).double(), wanted, rtol=1e-5, atol=1e-5)
    only_q = [t for t, slot in enumerate(slots) if slot in (2, -1)]
    assert torch.equal(outputs(layer, slots, x)[only_q, SIZES["q"] :], base[only_q, SIZES["q"] :])


def test_equal_scalings_leave_the_weights_bits() -> None:
    layer = qkv_layer(torch.bfloat16)
    q, k, v = layer.slices
    pool = AdapterPool({"q": q, "k": k, "v": v})
    parts = {m: weights(WIDTH, n, 4, 1 / 3, m) for m, n in SIZES.items()}
    slot = pool.load("a", Adapter(parts))
    lora_b = torch.cat([part.lora_b for part in parts.values()])
    assert torch.equal(layer.lora_b[slot, :, :4], lora_b.bfloat16())


@pytest.mark.parametrize(
    ("rows_of_a", "rows_of_b", "rank", "message"),
    [
        (3, 20, 3, "A has 3 rows for 3 slices and B of rank 3"),
        (27, 20, 9, "A has 27 rows for 3 slices and B of rank 9, .* r <= 8"),
        (9, 19, 3, r"B is \[19, 3\], the model needs \[20, 3\]"),
    ],
)
def test_what_is_no_stack_of_three_changes_nothing(
    rows_of_a: int, rows_of_b: int, rank: int, message: str
) -> None:
    layer = qkv_layer()
    with pytest.raises(ValueError, match=message):
        layer.write_slot(0, torch.ones(rows_of_a, WIDTH), torch.ones(rows_of_b, rank))
    assert layer.lora_a.isnan().all() and layer.lora_b.isnan().all()


def test_an_adapter_of_the_whole_stack() -> None:
    layer = qkv_layer()
    pool = AdapterPool({"qkv": layer, "q": layer.slices[0]})
    whole = weights(WIDTH, sum(SIZES.values()), 3, 0.5, "qkv")
    slot = pool.load("a", Adapter({"qkv": whole}))
    x = torch.randn(2, WIDTH)
    with torch.no_grad():
        wanted = layer.base(x).double() + x.double() @ delta(whole).T
    torch.testing.assert_close(outputs(layer, [slot] * 2, x).double(), wanted, rtol=1e-5, atol=1e-5)
    part = weights(WIDTH, SIZES["q"], 3, 0.5, "q")
    with pytest.raises(AdapterError, match="'q': another module has weights for the same"):
        pool.load("b", Adapter({"qkv": whole, "q": part}))
    with pytest.raises(AdapterError, match=r"'q': B is \[13, 3\], the model needs \[12, 3\]"):
        pool.load("b", Adapter({"q": weights(WIDTH, 13, 3, 0.5, "q")}))
    assert list(pool.adapters) == ["a"]


# ---- added tokens


def embedding_layer(num_added_tokens: int) -> LoRAVocabParallelEmbedding:
    torch.manual_seed(0)
    return LoRAVocabParallelEmbedding(
        nn.Embedding(VOCABULARY, WIDTH), 2, MAX_RANK, num_added_tokens=num_added_tokens
    )


def resized(layer: LoRAVocabParallelEmbedding, num_added: int, scale: float = 1.0) -> Tensor:
    """A base weight as PEFT stores it with an adapter whose tokenizer was extended."""
    rows = torch.randn(num_added, WIDTH, generator=generator("rows", num_added))
    return torch.cat([layer.weight.detach() * scale, rows])


def test_an_adapter_brings_its_tokens() -> None:
    layer = embedding_layer(3)
    pool = AdapterPool({"embed": layer})
    lora = weights(VOCABULARY + 2, WIDTH, 4, 0.5, "embed", is_embedding=True)
    table = resized(layer, 2)
    slot = pool.load("a", Adapter({"embed": lora}, {"embed": table}))
    ids = torch.tensor([3, VOCABULARY, VOCABULARY + 1, VOCABULARY + 2, VOCABULARY, 5])
    slots = [slot] * 4 + [-1] * 2
    wanted = table.new_zeros(6, WIDTH).double()
    wanted[:3] = table[ids[:3]].double() + delta(lora).T[ids[:3]]
    wanted[5] = table[5]
    torch.testing.assert_close(outputs(layer, slots, ids).double(), wanted, rtol=1e-5, atol=1e-5)

    # Another adapter in the slot: nothing of the first one's tokens is left.
    other = weights(VOCABULARY, WIDTH, 4, 0.5, "other", is_embedding=True)
    pool.load("a", Adapter({"embed": other}), replace=True)
    assert not outputs(layer, slots, ids)[1:5].any()


@pytest.mark.parametrize(
    ("room", "num_added", "scale", "message"),
    [
        (1, 2, 1.0, r"its own base weight \[42, 16\] for 'embed'"),
        (0, 1, 1.0, r"its own base weight \[41, 16\] for 'embed'"),
        (2, 2, 1.5, r"its own base weight \[42, 16\] for 'embed'"),
    ],
)
def test_tokens_without_room_or_over_another_base(
    room: int, num_added: int, scale: float, message: str
) -> None:
    layer = embedding_layer(room)
    pool = AdapterPool({"embed": layer})
    lora = weights(VOCABULARY, WIDTH, 4, 0.5, "embed", is_embedding=True)
    table = resized(layer, num_added, scale)
    with pytest.raises(AdapterError, match=message):
        pool.load("a", Adapter({"embed": lora}, {"embed": table}))
    assert not len(pool) and not layer.ranks.any() and not layer.num_added.any()


def test_columns_of_a_without_room() -> None:
    lora = weights(VOCABULARY + 3, WIDTH, 4, 0.5, "embed", is_embedding=True)
    with pytest.raises(AdapterError, match=r"A is \[4, 43\], the model needs \[4, 40 to 42\]"):
        AdapterPool({"embed": embedding_layer(2)}).load("a", Adapter({"embed": lora}))


# ---- several ranks


def check_pool_of_shards(device: str) -> None:
    """Every rank loads the whole adapter; what one rank cannot take, none does."""
    torch.manual_seed(0)
    whole = nn.ModuleDict(
        {
            "embed": nn.Embedding(VOCABULARY, WIDTH),
            "up": nn.Linear(WIDTH, 24),
            "down": nn.Linear(24, WIDTH),
            "head": nn.Linear(WIDTH, VOCABULARY, bias=False),
        }
    ).to(device)
    routing = Routing()
    kinds: dict[str, type[LoRAModule]] = {
        "embed": LoRAVocabParallelEmbedding,
        "up": LoRAColumnParallelLinear,
        "down": LoRARowParallelLinear,
        "head": LoRALMHead,
    }
    layers = {
        name: kind.from_full(whole[name], 2, MAX_RANK, routing, group=world())
        for name, kind in kinds.items()
    }
    pool = AdapterPool(layers)
    loras = {
        "embed": weights(VOCABULARY, WIDTH, 4, 0.5, "embed", is_embedding=True),
        "up": weights(WIDTH, 24, 3, 2.0, "up"),
        "down": weights(24, WIDTH, 8, 0.25, "down"),
        "head": weights(WIDTH, VOCABULARY, 2, 1.0, "head"),
    }
    tables = {name: whole[name].weight.detach().clone() for name in ("embed", "head")}
    for name in tables:
        for row in (0, VOCABULARY - 1):  # which one rank or the other has
            other = tables[name].clone()
            other[row] += 1
            with pytest.raises(AdapterError, match=f"its own base weight .* for '{name}'"):
                pool.load("a", Adapter(loras, {**tables, name: other}))
    assert not len(pool) and not any(layer.ranks.any() for layer in layers.values())

    slot = pool.load("a", Adapter(loras, tables))
    ids = torch.arange(VOCABULARY, device=device)
    batch = LoRABatch(64, 2, device)
    batch.update([slot] * VOCABULARY)
    with routing.using(batch), torch.no_grad():
        hidden = torch.relu(layers["up"](layers["embed"](ids)))
        logits = layers["head"](layers["down"](hidden))
    merged = {n: whole[n].weight.detach().double() + d.to(device) for n, d in deltas(loras).items()}
    hidden = merged["embed"] @ merged["up"].T + whole["up"].bias.double()
    hidden = torch.relu(hidden) @ merged["down"].T + whole["down"].bias.double()
    wanted = hidden @ merged["head"].T
    assert (logits.double() - wanted).norm() < 1e-6 * wanted.norm()

    assert 0 < pool.adapters["a"].num_bytes < Adapter(loras).num_bytes
    # Both ranks together hold what is cut once, and what is not cut twice.
    total = torch.tensor(pool.adapters["a"].num_bytes, device=device)
    dist.all_reduce(total)
    twice = (loras["embed"].lora_b, loras["up"].lora_a, loras["down"].lora_b, loras["head"].lora_a)
    assert int(total) == Adapter(loras).num_bytes + sum(tensor.nbytes for tensor in twice)


def deltas(loras: dict[str, LoRAWeights]) -> dict[str, Tensor]:
    return {n: delta(w).T if w.is_embedding else delta(w) for n, w in loras.items()}


def test_a_pool_of_shards(workers: Workers) -> None:
    workers.run(check_pool_of_shards)
