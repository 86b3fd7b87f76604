"""parallelize: two processes compute what the whole model computes, and PEFT, for each row."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import lora_ext
from distributed import Workers, world
from lora_ext.integrations.hf_parallel import parallelize
from lora_ext.layers import LoRAModule
from numerics import assert_same_bits
from tiny_models import (
    ADAPTERS,
    MAX_RANK,
    MODELS,
    assert_agrees,
    peft_model,
    save_adapters,
    tiny_model,
)

ROWS = ["attention", None, "everything", "patterns", "head", "embedding", None, "attention"]
PROMPTS = torch.randint(1, 128, (len(ROWS), 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that PEFT saved, by architecture and configuration; made when first asked for."""
    return tmp_path_factory.mktemp("adapters")


def saved(directory: Path, kind: str, config: dict[str, Any]) -> Path:
    """Return the folder of all adapters of a model."""
    folder = directory / "-".join([kind, *(f"{k}={v}" for k, v in config.items())])
    if not folder.exists():
        save_adapters(tiny_model(kind, **config), folder)
    return folder


def loaded(lora: lora_ext.LoRAModel, folder: Path) -> lora_ext.LoRAModel:
    for name in ADAPTERS:
        lora.load_adapter(name, folder / name)
    return lora


def check_logits(device: str, folder: Path, kind: str, config: dict[str, Any]) -> None:
    model = tiny_model(kind, device, **config)
    options = {"max_adapters": 6, "max_rank": MAX_RANK}
    whole = loaded(lora_ext.wrap(copy.deepcopy(model), **options), folder)
    cut = type(model)(model.config).to(device)  # another model of the same config
    cut.load_state_dict(model.state_dict())
    lora = loaded(parallelize(cut.eval(), world(), **options), folder)
    ids = PROMPTS.to(device)
    with torch.no_grad():
        ours = lora(ids, adapters=ROWS).logits
        for row, wanted in zip(ours, whole(ids, adapters=ROWS).logits, strict=True):
            assert_agrees(row, wanted)
        base = model(ids).logits
        assert_agrees(lora(ids).logits, base)
        for name in dict.fromkeys(ROWS):
            rows = [i for i, row in enumerate(ROWS) if row == name]
            if name is not None:
                theirs = peft_model(model, folder / name)(ids[rows]).logits
                assert_agrees(ours[rows], theirs)
                assert (theirs - base[rows]).norm() > 0.01 * base[rows].norm()
    same = ours.clone()
    dist.broadcast(same, 0)
    assert_same_bits(ours, same)
    config, own = model.config, lora.model.config
    assert (config.num_attention_heads, own.num_attention_heads) == (4, 2)
    # Each rank holds its part of the weights, but for the norms.
    held = sum(p.numel() for p in lora.model.parameters())
    assert held < 0.62 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", MODELS)
def test_every_row_is_what_one_process_computes(
    workers: Workers, directory: Path, kind: str
) -> None:
    workers.run(check_logits, saved(directory, kind, {}), kind, {})


@pytest.mark.parametrize(
    "config",
    [{"num_key_value_heads": 1}, {"vocab_size": 131}, {"tie_word_embeddings": True}],
    ids=str,
)
def test_one_kv_head_odd_vocabulary_tied_embeddings(
    workers: Workers, directory: Path, config: dict[str, Any]
) -> None:
    workers.run(check_logits, saved(directory, "llama", config), "llama", config)


def check_generate(device: str, folder: Path, options: dict[str, Any]) -> None:
    model = tiny_model(device=device, num_key_value_heads=1)
    limits = {"max_adapters": 6, "max_rank": MAX_RANK}
    whole = loaded(lora_ext.wrap(copy.deepcopy(model), **limits), folder)
    lora = loaded(parallelize(model, world(), **limits), folder)
    ids = PROMPTS.to(device)
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    wanted = whole.generate(ids, adapters=ROWS, **options)
    assert torch.equal(lora.generate(ids, adapters=ROWS, **options), wanted)
    lora.remove_adapter("everything")
    lora.load_adapter("everything", folder / "head")
    wanted = whole.generate(ids[:1], adapters=["head"], **options)
    assert torch.equal(lora.generate(ids[:1], adapters=["everything"], **options), wanted)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["greedy", "beams", "static cache"],
)
def test_generate(workers: Workers, directory: Path, options: dict[str, Any]) -> None:
    config = {"num_key_value_heads": 1}
    workers.run(check_generate, saved(directory, "llama", config), options)


def check_half_precision(device: str, folder: Path, dtype: torch.dtype) -> None:
    options = {"max_adapters": 6, "max_rank": MAX_RANK}
    exact = loaded(lora_ext.wrap(tiny_model(device=device), **options), folder)
    model = tiny_model(device="cpu", dtype=dtype)
    lora = loaded(parallelize(model, world(), logits_dtype=torch.float32, **options), folder)
    lora.model.to(device)  # what was loaded goes along
    ids = PROMPTS.to(device)
    with torch.no_grad():
        ours = lora(ids, adapters=ROWS).logits
        wanted = exact(ids, adapters=ROWS).logits
    assert ours.dtype == torch.float32
    for mine, other in zip(ours, wanted, strict=True):
        assert (mine - other).norm() < 10 * torch.finfo(dtype).eps * other.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_near_float32(
    workers: Workers, directory: Path, dtype: torch.dtype
) -> None:
    workers.run(check_half_precision, saved(directory, "llama", {}), dtype)


def check_refusals(device: str) -> None:
    def refused(message: str, model: Any) -> None:
        heads = model.config.num_attention_heads
        with pytest.raises(ValueError, match=message):
            parallelize(model, world(), max_adapters=1, max_rank=4)
        assert model.config.num_attention_heads == heads
        assert not any(isinstance(module, LoRAModule) for module in model.modules())

    refused(
        "3 attention heads do not divide among 2 ranks",
        tiny_model(hidden_size=48, num_attention_heads=3, num_key_value_heads=3),
    )
    refused(
        "'model.layers.0.mlp.gate_proj' cannot be cut among 2 ranks: .* is 97",
        tiny_model(intermediate_size=97),
    )
    refused("mlp.* cannot be cut .*: it is not known how", tiny_model("qwen3_moe"))
    model = tiny_model()
    model.model.layers[1].mlp.extra = torch.nn.Linear(4, 4)
    refused("'model.layers.1.mlp.extra' cannot be cut .*: it is not known how", model)


def test_what_cannot_be_cut_leaves_the_model(workers: Workers) -> None:
    workers.run(check_refusals)
