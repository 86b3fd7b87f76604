"""MoE blocks with a list of experts, as transformers had them before version 5; PEFT adapts those
expert by expert, so what it saves and computes here is its own for single experts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_ext
from lora_ext.layers import FusedMoE
from tiny_models import assert_agrees, peft_model, save_adapter

E, TOP_K, H, WIDTH = 6, 2, 32, 24
NAMES = {"qwen3_moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}


class Expert(nn.Module):
    def __init__(self, names: tuple[str, str, str]) -> None:
        super().__init__()
        self.names = names
        for name, sizes in zip(names, [(H, WIDTH), (H, WIDTH), (WIDTH, H)], strict=True):
            self.add_module(name, nn.Linear(*sizes, bias=False))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in self.names)
        result: Tensor = down(self.act_fn(gate(x)) * up(x))
        return result


def sum_of_experts(experts: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        token, choice = torch.where(chosen == e)
        y.index_add_(0, token, expert(x[token]) * weights[token, choice, None])
    return y


class CalledList(nn.ModuleList):
    """A list with a forward of its own, which the block calls."""

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return sum_of_experts(self, hidden_states, index, weights)


class Block(nn.Module):
    """Routes, and runs each expert on its tokens."""

    def __init__(self, kind: str, called: bool) -> None:
        super().__init__()
        experts = [Expert(NAMES[kind]) for _ in range(E)]
        self.top_k = TOP_K
        self.called = called
        if kind == "qwen3_moe":
            self.norm_topk_prob = False
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = CalledList(experts) if called else nn.ModuleList(experts)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states.view(-1, H)
        logits = self.gate(x)
        weights, chosen = torch.topk(logits.softmax(dim=1, dtype=torch.float), self.top_k)
        if getattr(self, "norm_topk_prob", True):
            weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = weights.to(x.dtype)
        if self.called:
            y = self.experts(x, chosen, weights)
        else:
            y = sum_of_experts(self.experts, x, chosen, weights)
        return y.view_as(hidden_states), logits


class Model(nn.Module):
    """As much of a causal LM as wrap looks at."""

    def __init__(self, kind: str, called: bool) -> None:
        super().__init__()
        name = "mlp" if kind == "qwen3_moe" else "block_sparse_moe"
        self.block_name = name
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(50, H)
        layers = []
        for _ in range(2):
            layer = nn.Module()
            layer.add_module(name, Block(kind, called))
            layers.append(layer)
        self.model.layers = nn.ModuleList(layers)
        self.lm_head = nn.Linear(H, 50, bias=False)

    def get_input_embeddings(self) -> Any:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> Any:
        return self.lm_head

    def prepare_inputs_for_generation(self) -> None: ...

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            y, logits = layer.get_submodule(self.block_name)(hidden)
            hidden = hidden + y
        return self.lm_head(hidden), logits


def make(kind: str, called: bool) -> Any:
    torch.manual_seed(0)
    return Model(kind, called).requires_grad_(False).eval()


@pytest.mark.parametrize("called", [False, True], ids=["list", "called list"])
@pytest.mark.parametrize("kind", NAMES)
def test_every_row_is_what_peft_computes(kind: str, called: bool, tmp_path: Path) -> None:
    model = make(kind, called)
    gate, up, down = NAMES[kind]
    configs: dict[str, dict[str, Any]] = {
        "all": {"r": 3, "target_modules": [gate, up, down, "gate", "lm_head"], "use_rslora": True},
        "gate": {"r": 2, "target_modules": ["gate"]},
        "some": {
            "r": 2,
            "target_modules": rf".*layers\.1\..*experts\.[14]\.({gate}|{down})",
            "rank_pattern": {rf"experts\.4\.{gate}": 4},
            "alpha_pattern": {rf"experts\.1\.{down}": 3},
        },
    }
    directories = {
        name: save_adapter(model, tmp_path / name, seed=i, **config)
        for i, (name, config) in enumerate(configs.items())
    }
    lora = lora_ext.wrap(copy.deepcopy(model), max_adapters=3, max_rank=4)
    for name, directory in directories.items():
        lora.load_adapter(name, directory)
    rows = ["all", None, *[name for name in directories if name != "all"], "all"]
    ids = torch.randint(50, (len(rows), 7))
    with torch.no_grad():
        assert_agrees(lora(ids)[0], model(ids)[0])
        ours, logits = lora(ids, adapters=rows)
        assert logits.shape == (ids.numel(), E)
        for i, name in enumerate(rows):
            theirs = peft_model(model, directories[name] if name else None)(ids)[0]
            assert_agrees(ours[i], theirs[i])
            if name is not None:
                assert (theirs[i] - model(ids)[0][i]).norm() > 1e-3 * theirs[i].norm()


def test_weights_are_not_held_twice() -> None:
    model = make("qwen3_moe", False)
    before = sum(p.nbytes for p in model.parameters())
    lora = lora_ext.wrap(model, max_adapters=1, max_rank=2)
    assert sum(p.nbytes for p in lora.model.parameters()) == before
    names = [n for n, module in lora.model.named_modules() if isinstance(module, FusedMoE)]
    assert names == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


def test_experts_of_an_unknown_block_are_left_alone(tmp_path: Path) -> None:
    model = make("qwen3_moe", False)
    for layer in model.model.layers:
        layer.mlp.shared_expert = Expert(NAMES["qwen3_moe"])
    directory = save_adapter(model, tmp_path, r=2, target_modules=["up_proj"])
    lora = lora_ext.wrap(copy.deepcopy(model), max_adapters=1, max_rank=2)
    assert not any(isinstance(module, FusedMoE) for module in lora.model.modules())
    with pytest.raises(lora_ext.AdapterError, match=r"experts.up_proj'.*no layer of this name"):
        lora.load_adapter("a", directory)
    ids = torch.randint(50, (2, 3))
    with torch.no_grad(), lora.use([None, None]):
        assert torch.equal(lora.model(ids)[0], model(ids)[0])
