"""wrap over Hugging Face's MoE models: each row of a mixed batch is what PEFT computes for it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_ext
from generators import on_devices
from lora_ext import AdapterError
from lora_ext.layers import FusedMoE
from test_moe_adapters import per_expert, save
from tiny_models import MOE_MODELS, assert_agrees, peft_model, save_adapter, tiny_model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by waiting for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


CONFIGS: dict[str, dict[str, Any]] = {
    "experts": {
        "r": 3,
        "lora_alpha": 7,
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
    "down": {
        "r": 5,
        "use_rslora": True,
        "target_modules": ["o_proj", "lm_head", "embed_tokens"],
        "target_parameters": ["layers.1.mlp.experts.down_proj"],
    },
    "attention": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 4, "target_modules": "all-linear"},  # routers too; gate and up together rank 8
}
ROWS = ["experts", None, "down", "all", "attention", "experts", None]


@on_devices
@pytest.mark.parametrize("kind", [*MOE_MODELS, "gpt_oss"])
def test_every_row_is_what_peft_computes(kind: str, device: str, tmp_path: Path) -> None:
    """gpt-oss: transposed weights, biases, gate and up in turns; a router that is left alone."""
    model = tiny_model(kind, device)
    lora = lora_ext.wrap(copy.deepcopy(model), max_adapters=4, max_rank=8)
    rows = [row for row in ROWS if kind != "gpt_oss" or row != "all"]
    directories = {
        name: save_adapter(tiny_model(kind), tmp_path / name, seed=i, **config)
        for i, (name, config) in enumerate(CONFIGS.items())
        if name in rows
    }
    for name, directory in directories.items():
        lora.load_adapter(name, directory)
    ids = torch.randint(1, 128, (len(rows), 9), generator=torch.Generator().manual_seed(3))
    ids = ids.to(device)
    with torch.no_grad():
        ours, base = lora(ids, adapters=rows).logits, lora(ids).logits
        assert_agrees(base, model(ids).logits)
        for name in dict.fromkeys(rows):
            theirs = peft_model(model, directories[name] if name else None)(ids).logits
            for i in (i for i, row in enumerate(rows) if row == name):
                assert_agrees(ours[i], theirs[i])
                assert name is None or (theirs[i] - base[i]).norm() > 0.01 * base[i].norm()


@pytest.mark.parametrize("kind", MOE_MODELS)
def test_adapters_of_single_experts(kind: str, tmp_path: Path) -> None:
    """Mixtral's have its old names; PEFT fuses them when it loads them."""
    torch.manual_seed(0)
    names, layer = ("gate_proj", "up_proj", "down_proj"), "model.layers.1.mlp.experts"
    if kind == "mixtral":
        names, layer = ("w1", "w3", "w2"), "model.layers.1.block_sparse_moe.experts"
    model = tiny_model(kind)
    directory = save(tmp_path, per_expert(layer, names), target_modules=list(names))
    lora = lora_ext.wrap(copy.deepcopy(model), max_adapters=1, max_rank=3)
    lora.load_adapter("a", directory)
    ids = torch.randint(1, 128, (3, 5))
    with torch.no_grad():
        ours = lora(ids, adapters=["a", None, "a"]).logits
        theirs, base = peft_model(model, directory)(ids).logits, model(ids).logits
    assert_agrees(ours[[0, 2]], theirs[[0, 2]])
    assert_agrees(ours[1], base[1])


def test_shared_outer_experts(tmp_path: Path) -> None:
    """Adapters with one A of gate and up, and one B of down, in a model that keeps them once."""
    torch.manual_seed(0)
    names, layer = ("gate_proj", "up_proj", "down_proj"), "model.layers.0.mlp.experts"
    tensors = per_expert(layer, names)
    other = save(tmp_path / "other", tensors, target_modules=list(names))
    for name in tensors:
        if name.endswith(("gate_proj.lora_A.weight", "up_proj.lora_A.weight")) or name.endswith(
            "down_proj.lora_B.weight"
        ):
            _, _, rest = name.removeprefix(f"{layer}.").partition(".")
            tensors[name] = tensors[f"{layer}.0.{rest}"].clone()
    directory = save(tmp_path / "shared", tensors, target_modules=list(names))
    model = tiny_model("qwen3_moe")
    lora = lora_ext.wrap(
        copy.deepcopy(model), max_adapters=2, max_rank=3, shared_outer_experts=True
    )
    lora.load_adapter("a", directory)
    ids = torch.randint(1, 128, (2, 5))
    with torch.no_grad():
        ours = lora(ids, adapters=["a", "a"]).logits
        assert_agrees(ours, peft_model(model, directory)(ids).logits)
    with pytest.raises(AdapterError, match=r"differ in [AB]"):
        lora.load_adapter("b", other)


@on_devices
def test_generate(device: str, tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", device)
    directory = save_adapter(tiny_model("qwen3_moe"), tmp_path, **CONFIGS["experts"])
    lora = lora_ext.wrap(copy.deepcopy(model), max_adapters=2, max_rank=4)
    lora.load_adapter("a", directory)
    ids = torch.randint(1, 128, (3, 7), generator=torch.Generator().manual_seed(4)).to(device)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    ours = lora.generate(ids, adapters=["a", None, "a"], **options)
    theirs = peft_model(model, directory).generate(input_ids=ids, **options)
    assert torch.equal(ours[[0, 2]], theirs[[0, 2]])
    assert torch.equal(ours[1], model.generate(ids, **options)[1])
    beams = lora.generate(ids, adapters=["a", None, "a"], num_beams=3, **options)
    theirs = peft_model(model, directory).generate(input_ids=ids, num_beams=3, **options)
    assert torch.equal(beams[[0, 2]], theirs[[0, 2]])


def test_target_modules_leave_experts_out() -> None:
    lora = lora_ext.wrap(
        tiny_model("mixtral"), max_adapters=1, max_rank=2, target_modules=["q_proj"]
    )
    assert not any(isinstance(module, FusedMoE) for module in lora.model.modules())
    lora = lora_ext.wrap(
        tiny_model("mixtral"), max_adapters=1, max_rank=2, target_modules=["mlp.experts"]
    )
    assert sum(isinstance(module, FusedMoE) for module in lora.model.modules()) == 2
