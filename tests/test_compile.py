"""torch.compile: one program for every batch, mix and number of tokens, and no copy of y."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import linear, rms_norm, silu

from generators import apply_, generator, make_module, on_devices, randn
from lora_ext import LoRABatch, ops
from numerics import assert_same_bits

RANKS = [3, 16, 0, 8]
NUM_SLOTS, MAX_RANK = len(RANKS), 16
HIDDEN, MIDDLE, VOCABULARY = 32, 48, 50
MAX_TOKENS = 64
# Tokens and slots of each batch: other mixes, other lengths, no adapter at all.
BATCHES = [
    [t % NUM_SLOTS for t in range(40)],
    [-1] * 40,
    [1] * 7,
    [3, -1],
    [t % 5 - 1 for t in range(MAX_TOKENS)],
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield


class Adapters(NamedTuple):
    """One module's slots."""

    lora_a: Tensor
    lora_b: Tensor
    ranks: Tensor
    scalings: Tensor

    @classmethod
    def random(cls, slices: Sequence[int], in_features: int, device: str, seed: int) -> Adapters:
        ranks = RANKS if seed == 0 else [8, 0, 5, 16]
        module = make_module(
            ranks, in_features, slices, torch.float32, device, max_rank=MAX_RANK, seed=seed
        )
        weights = module.weights("packed")
        return cls(weights.lora_a[0], weights.lora_b[0], module.ranks, module.scalings)


class Decoder(nn.Module):
    """Every dense operator, each in the place that it has in a model."""

    # Output slices and input features of each layer.
    LAYERS: ClassVar[dict[str, tuple[list[int], int]]] = {
        "embedding": ([HIDDEN], VOCABULARY),
        "gate_up": ([MIDDLE, MIDDLE], HIDDEN),
        "down": ([HIDDEN], MIDDLE),
        "head": ([VOCABULARY], HIDDEN),
    }

    def __init__(self, device: str) -> None:
        super().__init__()
        gen = generator("decoder")
        for name, (slices, in_features) in self.LAYERS.items():
            values = randn((sum(slices), in_features), torch.float32, device, gen, 0.2)
            self.register_buffer(f"{name}_weight", values)
        self.adapters = self.random_adapters(device, 0)

    @classmethod
    def random_adapters(cls, device: str, seed: int) -> dict[str, Adapters]:
        return {
            name: Adapters.random(slices, in_features, device, seed)
            for name, (slices, in_features) in cls.LAYERS.items()
        }

    def forward(
        self, ids: Tensor, plan: Tensor, adapters: Mapping[str, Sequence[Tensor]] | None = None
    ) -> Tensor:
        """ids ``[1, T]`` to logits ``[1, T, VOCABULARY]``."""
        adapters = self.adapters if adapters is None else adapters
        x = nn.functional.embedding(ids, self.embedding_weight.T)
        lora_a, lora_b, *rest = adapters["embedding"]
        ops.lora_embedding_apply_(x.view(-1, HIDDEN), ids.view(-1), lora_a, lora_b, *rest, plan)

        hidden = rms_norm(x, (HIDDEN,))
        y = linear(hidden, self.gate_up_weight)
        lora_a, lora_b, *rest = adapters["gate_up"]
        ops.lora_apply_(
            y.view(-1, 2 * MIDDLE),
            hidden.view(-1, HIDDEN),
            [lora_a],
            [lora_b],
            *rest,
            plan,
            output_slices=[MIDDLE, MIDDLE],
            max_rank=MAX_RANK,
        )
        gate, up = y.chunk(2, dim=-1)
        lora_a, lora_b, *rest = adapters["down"]
        x = x + ops.lora_linear(
            silu(gate) * up,
            self.down_weight,
            None,
            [lora_a],
            [lora_b],
            *rest,
            plan,
            output_slices=[HIDDEN],
            max_rank=MAX_RANK,
        )
        hidden = rms_norm(x, (HIDDEN,))
        logits = linear(hidden, self.head_weight)
        lora_a, lora_b, ranks, scalings = adapters["head"]
        xa = ops.lora_shrink(
            hidden.view(-1, HIDDEN), [lora_a], ranks, scalings, plan, max_rank=MAX_RANK
        )
        ops.lora_expand_(
            logits.view(-1, VOCABULARY),
            xa,
            [lora_b],
            ranks,
            plan,
            output_slices=[VOCABULARY],
            max_rank=MAX_RANK,
        )
        return logits

    def reload(self) -> None:
        """Put other adapters, of other ranks, into the slots, in place."""
        for name, others in self.random_adapters(str(self.down_weight.device), 1).items():
            for mine, other in zip(self.adapters[name], others, strict=True):
                mine.copy_(other)


def step(batch: LoRABatch, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
    """ids and plan of a batch."""
    batch.update(slots)
    gen = generator("ids", len(slots))
    ids = torch.randint(0, VOCABULARY, (1, len(slots)), generator=gen)
    return ids.to(batch.device), batch.plan


def assert_agree(actual: Tensor, expected: Tensor) -> None:
    # By norm: fused pointwise operators round elsewhere than eager ones.
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("device", "mode"),
    [
        ("cpu", "default"),
        pytest.param("cuda", "default", marks=pytest.mark.gpu),
        pytest.param("cuda", "reduce-overhead", marks=pytest.mark.gpu),
    ],
)
def test_one_program_for_every_batch(device: str, mode: str) -> None:
    model, batch = Decoder(device), LoRABatch(MAX_TOKENS, NUM_SLOTS, device)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, mode=mode)
    for _ in range(3):  # with CUDA graphs: warm-up, recording, replay
        for slots in BATCHES:
            ids, plan = step(batch, slots)
            torch.compiler.cudagraph_mark_step_begin()
            assert_agree(compiled(ids, plan), model(ids, plan))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert counters["inductor"]["cudagraph_skips"] == 0


@on_devices
def test_slots_reloaded_in_place_are_no_other_program(device: str) -> None:
    model, batch = Decoder(device), LoRABatch(MAX_TOKENS, NUM_SLOTS, device)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    ids, plan = step(batch, BATCHES[0])
    before = compiled(ids, plan)
    model.reload()
    after = compiled(ids, plan)
    assert_agree(after, model(ids, plan))
    assert (after - before).norm() > 0.1 * before.norm()
    assert counters["stats"]["unique_graphs"] == 1


@on_devices
def test_one_token_needs_no_program_of_its_own(device: str) -> None:
    """torch specialises sizes of 0 and 1, unless the caller says that any size may come."""
    module = make_module(RANKS, HIDDEN, [24, 8], torch.float32, device)
    weights = module.weights("packed")
    weight = randn((32, HIDDEN), torch.float32, device, generator("one"))
    batch = LoRABatch(MAX_TOKENS, NUM_SLOTS, device)

    def layer(x: Tensor, plan: Tensor) -> Tensor:
        y = linear(x, weight)
        apply_(y, x, module, weights, plan)
        return y

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for slots in ([1], [0, 3, -1], [3], [1] * 40, []):
        batch.update(slots)
        x = randn((len(slots), HIDDEN), torch.float32, device, generator("x", len(slots)))
        torch._dynamo.decorators.mark_unbacked(x, 0)
        assert_same_bits(compiled(x, batch.plan), layer(x, batch.plan))
    assert counters["stats"]["unique_graphs"] == 1


# ---- copies


class Site:
    """A layer with three slices, for the code that is generated around its operator."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.module = make_module(RANKS, HIDDEN, [24, 8, 8], torch.float32, device)
        self.weights = self.module.weights("packed")
        gen = generator("copies")
        self.weight = randn((40, HIDDEN), torch.float32, device, gen)
        self.wide = randn((100, HIDDEN), torch.float32, device, gen)

    def add(self, y: Tensor, x: Tensor, plan: Tensor) -> None:
        apply_(y, x, self.module, self.weights, plan)

    # What a model does with y, and how many buffers of the program that takes.

    def is_returned(self, x: Tensor, plan: Tensor) -> Tensor:
        y = linear(x, self.weight)
        self.add(y, x, plan)
        return y

    def is_a_view(self, x: Tensor, plan: Tensor) -> Tensor:
        y = linear(x[None], self.weight)
        self.add(y.view(-1, 40), x, plan)
        return y

    def is_a_part(self, x: Tensor, plan: Tensor) -> Tensor:
        y = linear(x, self.wide)
        self.add(y[:, 50:90], x, plan)
        return y

    def has_parts(self, x: Tensor, plan: Tensor) -> Tensor:
        y = linear(x, self.wide)
        self.add(y[:, :40], x, plan)
        self.add(y[:, 60:], x, plan)
        return y

    def is_used(self, x: Tensor, plan: Tensor) -> Tensor:
        y = linear(x, self.weight)
        self.add(y, x, plan)
        return torch.relu(y) * 2

    def comes_from_a_fused_operator(self, x: Tensor, plan: Tensor) -> Tensor:
        y = torch.relu(linear(x, self.weight)) + 1
        self.add(y, x, plan)
        return y

    def is_given(self, x: Tensor, plan: Tensor, y: Tensor) -> None:
        self.add(y, x, plan)

    def is_made_by_lora_linear(self, x: Tensor, plan: Tensor) -> Tensor:
        module, weights = self.module, self.weights
        sizes = {"output_slices": module.output_slices, "max_rank": module.max_rank}
        rest = (weights.lora_a, weights.lora_b, module.ranks, module.scalings, plan)
        return ops.lora_linear(x, self.weight, None, *rest, **sizes)

    def is_read_as_it_was(self, x: Tensor, plan: Tensor) -> tuple[Tensor, Tensor]:
        y = linear(x, self.weight)
        before = torch.relu(y)
        self.add(y, x, plan)
        return before, torch.relu(y)


def generated(call: Callable[..., Any], *arguments: Tensor) -> tuple[Any, str]:
    """The result, and the program."""
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    result, (code,) = run_and_get_code(compiled, *arguments)
    return result, re.split(r"\ndef (get_args|benchmark_compiled_module)\(", code)[0]


def buffers(code: str) -> int:
    return len(re.findall(r"= empty_strided_\w+\(", code))


@on_devices
@pytest.mark.parametrize(
    ("case", "most_buffers"),
    [
        ("is_returned", 1),
        ("is_a_view", 1),
        ("is_a_part", 1),
        ("has_parts", 1),
        ("is_used", 2),
        ("comes_from_a_fused_operator", 2),
        ("is_given", 0),
        ("is_made_by_lora_linear", 0),
    ],
)
def test_y_is_not_copied(device: str, case: str, most_buffers: int) -> None:
    site, batch = Site(device), LoRABatch(MAX_TOKENS, NUM_SLOTS, device)
    batch.update(BATCHES[0])
    gen = generator("x")
    x = randn((40, HIDDEN), torch.float32, device, gen)
    given = (randn((40, 40), torch.float32, device, gen),) if case == "is_given" else ()
    expected = [y.clone() for y in given]
    result, code = generated(getattr(site, case), x, batch.plan, *given)
    assert "lora_ext.lora_" in code
    assert "clone" not in code and ".copy_(" not in code, code
    assert buffers(code) <= most_buffers, code
    want = getattr(site, case)(x, batch.plan, *expected)
    for actual, eager in zip(given or (result,), expected or (want,), strict=True):
        assert_agree(actual, eager)


@on_devices
def test_a_y_that_is_read_as_it_was_is_not_lost(device: str) -> None:
    """The other side of it: here a copy must be made, and the check above must see it."""
    site, batch = Site(device), LoRABatch(MAX_TOKENS, NUM_SLOTS, device)
    batch.update(BATCHES[0])
    x = randn((40, HIDDEN), torch.float32, device, generator("x"))
    result, code = generated(site.is_read_as_it_was, x, batch.plan)
    for actual, eager in zip(result, site.is_read_as_it_was(x, batch.plan), strict=True):
        assert_agree(actual, eager)
    assert "clone" in code or buffers(code) > 2
