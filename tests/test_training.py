"""Fine-tuning through the layers: the gradients of a mixed batch are PEFT's, adapter by adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_ext
from generators import on_devices
from lora_ext import LoRABatch
from lora_ext.layers import LoRAEmbedding, LoRALinear
from tiny_models import assert_agrees, peft, save_adapter, tiny_model

ROWS = ["first", "second", None, "first", "second", "second"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "first": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "second": {"r": 7, "lora_alpha": 5, "target_modules": ["q_proj", "gate_proj", "lm_head"]},
}


def train_some_base_weights(model: nn.Module) -> None:
    """Let the base weights of q_proj be trained, and no others."""
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad_(".q_proj." in name)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits.double().square().sum()


@on_devices
def test_gradients_of_a_mixed_batch_are_pefts(device: str, tmp_path: Path) -> None:
    model = tiny_model(device=device)
    directories = {
        name: save_adapter(model, tmp_path / name, seed=seed, **config)
        for seed, (name, config) in enumerate(ADAPTERS.items())
    }
    lora = lora_ext.wrap(copy.deepcopy(model), max_adapters=3, max_rank=8)
    for name, directory in directories.items():
        lora.load_adapter(name, directory)
    layers = {n: m for n, m in lora.model.named_modules() if isinstance(m, LoRALinear)}
    train_some_base_weights(lora.model)
    for layer in layers.values():
        layer.lora_a.requires_grad_()
        layer.lora_b.requires_grad_()
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 128, (len(ROWS), 9), generator=generator).to(device)

    with lora.use(ROWS):
        loss_of(lora.model, ids).backward()

    base_gradients: dict[str, list[Tensor]] = {}
    compared = 0
    for adapter in dict.fromkeys(ROWS):
        theirs, prefix = copy.deepcopy(model), ""
        if adapter is not None:
            directory = str(directories[adapter])
            theirs = peft.PeftModel.from_pretrained(theirs, directory, is_trainable=True).eval()
            prefix = "base_model.model."
        train_some_base_weights(theirs)
        loss_of(theirs, ids[[i for i, row in enumerate(ROWS) if row == adapter]]).backward()
        for name, layer in layers.items():
            module = theirs.get_submodule(prefix + name)
            weight = getattr(module, "base_layer", module).weight
            if weight.grad is not None:
                base_gradients.setdefault(name, []).append(weight.grad)
            if isinstance(module, peft.tuners.lora.Linear):
                slot, rank = lora.adapters[adapter].slot, module.r["default"]
                grad_a, grad_b = layer.lora_a.grad, layer.lora_b.grad
                assert_agrees(grad_a[slot, :rank], module.lora_A["default"].weight.grad)
                assert_agrees(grad_b[slot, :, :rank], module.lora_B["default"].weight.grad)
                assert (grad_a[slot, rank:] == 0).all() and (grad_b[slot, :, rank:] == 0).all()
                assert (grad_a[2] == 0).all() and (grad_b[2] == 0).all()  # no adapter's slot
                compared += 1
    assert compared == 2 * 3 + 2 * 2 + 1
    assert len(base_gradients) == 2
    for name, gradients in base_gradients.items():
        assert_agrees(layers[name].weight.grad, sum(gradients))


def test_a_step_of_an_optimiser_is_in_force_at_once() -> None:
    base = nn.Linear(8, 12)
    base.requires_grad_(False)
    layer = LoRALinear(base, num_slots=2, max_rank=4)
    for slot in range(2):
        layer.write_slot(slot, torch.randn(4, 8), torch.zeros(12, 4))
        layer.set_slot(slot, 4, 2.0)
    batch = LoRABatch(64, 2)
    batch.update([0, -1, 0])
    x, target = torch.randn(3, 8), torch.randn(3, 12)
    weights = [layer.lora_a.requires_grad_(), layer.lora_b.requires_grad_()]
    other = [w[1].clone() for w in weights]
    optimiser = torch.optim.SGD(weights, lr=1e-3)

    def loss() -> Tensor:
        return (layer(x) - target).square().sum()

    with layer.routing.using(batch):
        losses = []
        for _ in range(5):
            losses.append(loss())
            optimiser.zero_grad()
            losses[-1].backward()
            optimiser.step()
        with torch.no_grad():  # the in-place path
            losses.append(loss())
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
    assert torch.equal(layer.lora_a[1], other[0]) and torch.equal(layer.lora_b[1], other[1])


@pytest.mark.parametrize("trained", ["weight", "lora_a", "lora_b"])
def test_an_embedding_refuses_what_it_cannot_record(trained: str) -> None:
    base = nn.Embedding(20, 8)
    base.requires_grad_(False)
    layer = LoRAEmbedding(base, num_slots=1, max_rank=4)
    layer.write_slot(0, torch.randn(4, 20), torch.randn(8, 4))
    layer.set_slot(0, 4, 1.0)
    batch = LoRABatch(64, 1)
    batch.update([0, 0])
    ids = torch.tensor([3, 4])
    with layer.routing.using(batch):
        frozen = layer(ids)
        assert not frozen.requires_grad
        getattr(layer, trained).requires_grad_()
        with pytest.raises(RuntimeError, match="are for inference"):
            layer(ids)
        with torch.no_grad():
            assert torch.equal(layer(ids), frozen)
