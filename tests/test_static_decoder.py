"""StaticDecoder: a Hugging Face model under wrap, with a static cache and a captured graph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_ext
from generators import on_devices
from lora_ext.integrations.static_decoder import StaticDecoder
from test_on_device import no_synchronisation
from tiny_models import MAX_RANK, MODELS, save_adapter, save_adapters, tiny_model

transformers = pytest.importorskip("transformers")

ROWS = 4
NEW_TOKENS = 14
# What the rows use at each third of the tokens.
MIXES: list[list[str | None]] = [
    ["attention", None, "everything", "head"],
    [None] * ROWS,
    ["patterns", "patterns", None, "everything"],
    ["embedding", "attention", "head", "patterns"],
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by waiting for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PEFT's directories of adapters, and of two that replace or evict others."""
    model, path = tiny_model(), tmp_path_factory.mktemp("adapters")
    found = save_adapters(model, path)
    targets = ["q_proj", "o_proj", "down_proj", "lm_head"]
    for name, rank in (("large", 16), ("late", 2)):
        found[name] = save_adapter(
            model, path / name, seed=len(found), r=rank, lora_alpha=rank, target_modules=targets
        )
    return found


def wrapped(directories: dict[str, Path], device: str, kind: str = "llama", **options: Any) -> Any:
    lora = lora_ext.wrap(tiny_model(kind, device), max_adapters=5, max_rank=MAX_RANK, **options)
    for name in ("attention", "everything", "patterns", "head", "embedding"):
        lora.load_adapter(name, directories[name])
    return lora


def prompts(device: str, tokens: int = 9) -> tuple[Tensor, Tensor]:
    """Random prompts of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 128, (ROWS, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(ROWS):
        mask[row, :row] = 0
    return (ids * mask).to(device), mask.to(device)


def expected(lora: Any, mixes: list[list[str | None]], between: Any = None) -> Tensor:
    """The new tokens of an eager loop with a cache that grows; `between` runs before each mix."""
    device = next(lora.model.parameters()).device
    ids, mask = prompts(device)
    cache, tokens, new = transformers.DynamicCache(), ids, []
    for part, mix in enumerate(mixes):
        if between is not None:
            between(part)
        for _ in range(NEW_TOKENS // len(mixes)):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            with torch.no_grad():
                logits = lora(
                    tokens,
                    adapters=mix,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                ).logits
            tokens = logits[:, -1].argmax(-1, keepdim=True)
            new.append(tokens)
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    return torch.cat(new, dim=1)


def decoded(decoder: StaticDecoder, mixes: list[list[str | None]], between: Any = None) -> Tensor:
    """The same from a decoder."""
    ids, mask = prompts(decoder.lora.model.device)
    new = []
    for part, mix in enumerate(mixes):
        if between is not None:
            between(part)
        if part:
            decoder.route(mix)
        for i in range(NEW_TOKENS // len(mixes)):
            if part == i == 0:
                new.append(decoder.prefill(ids, adapters=mix, attention_mask=mask))
            else:
                new.append(decoder.step())
    return torch.stack(new, dim=1)


@on_devices
@pytest.mark.parametrize("kind", MODELS)
def test_it_generates_what_the_model_does(device: str, kind: str, tmp_path: Path) -> None:
    lora = wrapped(save_adapters(tiny_model(kind), tmp_path), device, kind)
    ids, mask = prompts(device)
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS}
    with StaticDecoder(lora, ROWS, 32) as decoder:
        for mix in (*MIXES, *MIXES[:1]):
            ours = decoder.generate(ids, adapters=mix, **options)
            assert torch.equal(ours, lora.generate(ids, adapters=mix, do_sample=False, **options))
    # Without a mask there is no padding; another length of the prompt, other adapters before.
    with StaticDecoder(lora, ROWS, 32) as decoder:
        short = ids[:, 4:]
        theirs = lora.generate(short, adapters=MIXES[0], do_sample=False, max_new_tokens=5)
        ours = decoder.generate(short, adapters=MIXES[0], max_new_tokens=5)
        assert torch.equal(ours, theirs)


def test_a_window_that_holds_all_tokens_counts_on_the_device() -> None:
    """A graph repeats what the host had counted at its capture."""
    lora = lora_ext.wrap(tiny_model("mistral", sliding_window=32), max_adapters=1, max_rank=1)
    with StaticDecoder(lora, ROWS, 32) as decoder:
        assert not any(layer.is_sliding for layer in decoder._cache.layers)


@on_devices
def test_adapters_are_swapped_between_steps(device: str, directories: dict[str, Path]) -> None:
    lora = wrapped(directories, device)
    mixes = [MIXES[1], *MIXES[:1], *MIXES[2:]]
    with StaticDecoder(lora, ROWS, 32) as decoder:
        ours = decoded(decoder, mixes)
    assert torch.equal(ours, expected(lora, mixes))
    # The mixes matter: none of them alone gives these tokens.
    for mix in mixes:
        assert not torch.equal(ours, expected(lora, [mix]))


@on_devices
def test_slots_are_loaded_anew_between_steps(device: str, directories: dict[str, Path]) -> None:
    """Another adapter of another rank takes a slot over, and one is replaced while it is in use."""
    mixes: list[list[str | None]] = [
        ["attention", "head", None, "everything"],
        ["attention", "head", None, "everything"],
        ["late", "head", "large", None],
    ]

    def between(lora: Any) -> Any:
        def change(part: int) -> None:
            if part == 1:
                lora.load_adapter("head", directories["large"], replace=True)
            elif part == 2:  # "embedding" and "patterns" were unused for longest
                lora.load_adapter("late", directories["late"])
                lora.load_adapter("large", directories["large"])
                assert set(lora.adapters) == {"attention", "everything", "head", "late", "large"}

        return change

    theirs = wrapped(directories, device, evict_lru=True)
    wanted = expected(theirs, mixes, between(theirs))
    lora = wrapped(directories, device, evict_lru=True)
    with StaticDecoder(lora, ROWS, 32) as decoder:
        assert torch.equal(decoded(decoder, mixes, between(lora)), wanted)


@pytest.mark.gpu
def test_the_graph_is_the_eager_step_bit_for_bit(directories: dict[str, Path]) -> None:
    results = []
    for capture in (True, False):
        lora = wrapped(directories, "cuda")
        with StaticDecoder(lora, ROWS, 32, capture=capture) as decoder:
            tokens = decoded(decoder, MIXES)
            layers = decoder._cache.layers
            results.append([tokens, *(x for layer in layers for x in (layer.keys, layer.values))])
    for captured, eager in zip(*results, strict=True):
        assert torch.equal(captured, eager)


@on_devices
def test_an_enclosing_use_does_not_reach_the_steps(
    device: str, directories: dict[str, Path]
) -> None:
    lora = wrapped(directories, device)
    with lora.use(["head"] * ROWS), StaticDecoder(lora, ROWS, 32) as decoder:
        ours = decoded(decoder, MIXES)
    assert torch.equal(ours, expected(lora, MIXES))


@on_devices
def test_the_shortest_rows_there_can_be(device: str, directories: dict[str, Path]) -> None:
    lora = wrapped(directories, device)
    ids = prompts(device, 1)[0].clamp(min=1)  # 0 would be padding
    with StaticDecoder(lora, ROWS, 2) as decoder:
        ours = decoder.generate(ids, adapters=MIXES[0], max_new_tokens=2)
    theirs = lora.generate(ids, adapters=MIXES[0], do_sample=False, max_new_tokens=2)
    assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_nothing_waits_for_the_device(directories: dict[str, Path]) -> None:
    lora = wrapped(directories, "cuda")
    ids, mask = prompts("cuda")
    with StaticDecoder(lora, ROWS, 32) as decoder:
        decoder.prefill(ids, adapters=MIXES[0], attention_mask=mask)
        with no_synchronisation():
            for mix in MIXES:
                decoder.route(mix)
                decoder.step()


def test_adapters_of_the_rows_stay_until_others_come(directories: dict[str, Path]) -> None:
    lora = wrapped(directories, "cpu")
    ids, mask = prompts("cpu")
    with StaticDecoder(lora, ROWS, 32) as decoder:
        decoder.prefill(ids, adapters=MIXES[0], attention_mask=mask)
        assert {name for name, info in lora.adapters.items() if info.in_use} == {
            "attention",
            "everything",
            "head",
        }
        with pytest.raises(RuntimeError, match="in use"):
            lora.remove_adapter("head")
        with pytest.raises(KeyError, match="nobody"):
            decoder.route(["nobody", None, None, None])
        assert lora.adapters["head"].in_use
        decoder.route(MIXES[1])
        lora.remove_adapter("head")
        decoder.route(MIXES[2])
    assert not any(info.in_use for info in lora.adapters.values())


def test_it_refuses(directories: dict[str, Path]) -> None:
    lora = wrapped(directories, "cpu")
    ids, _ = prompts("cpu")
    with pytest.raises(ValueError, match="rows >= 1"):
        StaticDecoder(lora, 0, 32)
    decoder = StaticDecoder(lora, ROWS, 10)
    with pytest.raises(ValueError, match="nothing to go on from"):
        decoder.step()
    with pytest.raises(ValueError, match=r"\[3, 9\], expected \[4, 1 to 10\]"):
        decoder.prefill(ids[:3], adapters=MIXES[0])
    with pytest.raises(ValueError, match="got 3 adapters for 4 rows"):
        decoder.prefill(ids, adapters=MIXES[0][:3])
    decoder.prefill(ids, adapters=MIXES[0])
    decoder.step()
    with pytest.raises(ValueError, match="10 of 10 tokens"):
        decoder.step()
    windowed = lora_ext.wrap(tiny_model("mistral", sliding_window=8), max_adapters=1, max_rank=1)
    with pytest.raises(ValueError, match="sliding window"):
        StaticDecoder(windowed, ROWS, 32)
