"""Adapters of MoE experts: every form that they are saved in means what it means to PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_ext import Adapter, AdapterError, load_adapter
from lora_ext.adapters import LoRAWeights
from tiny_models import MOE_MODELS, peft_model, save_adapter, tiny_model

E, H, WIDTH, R = 6, 64, 24, 3
LAYER = "model.layers.0.mlp.experts"
OTHER = "model.layers.1.mlp.experts"
PREFIX = "base_model.model."


def delta(weights: LoRAWeights, num_experts: int = E) -> Tensor:
    """What the weights add to the stack of base weights: [E, N, K]."""
    lora_a, lora_b = weights.lora_a.double(), weights.lora_b.double()
    n = num_experts if weights.experts is None else len(weights.experts)
    product = weights.scaling * lora_b.expand(n, -1, -1) @ lora_a.expand(n, -1, -1)
    if weights.experts is None:
        return product
    whole = product.new_zeros(num_experts, *product.shape[1:])
    whole[list(weights.experts)] = product
    return whole


def gate_up_delta(adapter: Adapter, layer: str) -> Tensor:
    """As for the fused parameter, from whichever form the adapter has."""
    if f"{layer}.gate_up_proj" in adapter.modules:
        return delta(adapter.modules[f"{layer}.gate_up_proj"])
    halves = [adapter.modules.get(f"{layer}.{half}_proj") for half in ("gate", "up")]
    given = [torch.zeros(E, WIDTH, H).double() if half is None else delta(half) for half in halves]
    return torch.cat(given, dim=1)


def wrappers(model: Any) -> Iterator[tuple[str, str, Any]]:
    """PEFT's wrappers of expert parameters: the experts' name, the parameter, the wrapper."""
    for name, module in model.named_modules():
        if type(module).__name__ == "ParamWrapper":
            layer = name.removeprefix(PREFIX).replace(".base_layer", "")
            yield layer, module.parameter_name, module


def assert_means_the_same(adapter: Adapter, theirs: Any) -> int:
    """Compare with every wrapper of PEFT's; returns how many there were."""
    count = 0
    for layer, parameter, wrapper in wrappers(theirs):
        if parameter == "weight":
            continue
        wanted = wrapper.get_delta_weight("default").double()
        if parameter == "gate_up_proj":
            ours = gate_up_delta(adapter, layer)
        else:
            ours = delta(adapter.modules[f"{layer}.{parameter}"])
        assert wanted.abs().max() > 0.01
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
        count += 1
    return count


@pytest.mark.parametrize("kind", MOE_MODELS)
@pytest.mark.parametrize(
    "config",
    [
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        {"target_parameters": ["down_proj"]},
        {"target_parameters": ["layers.1.mlp.experts.gate_up_proj"]},
        {
            "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
            "rank_pattern": {r".*\.1\.mlp\.experts\.down_proj": 5, "gate_up_proj": 2},
            "alpha_pattern": {"down_proj": 11},
            "use_rslora": True,
        },
    ],
    ids=["both", "down", "gate_up of a layer", "patterns"],
)
def test_parameters_as_peft_saves_them(kind: str, config: Any, tmp_path: Path) -> None:
    model = tiny_model(kind)
    config = {"r": R, "lora_alpha": 7, "target_modules": ["q_proj"], **config}
    adapter = load_adapter(save_adapter(model, tmp_path, **config))
    theirs = peft_model(model, tmp_path)
    assert assert_means_the_same(adapter, theirs) == len(adapter.modules) - 2  # q_proj


def test_all_linear_adapts_router_and_experts(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    adapter = load_adapter(save_adapter(model, tmp_path, r=R, target_modules="all-linear"))
    theirs = peft_model(model, tmp_path)
    assert assert_means_the_same(adapter, theirs) == 4
    router = adapter.modules["model.layers.1.mlp.gate"]
    (wrapper,) = [
        m for n, p, m in wrappers(theirs) if (n, p) == ("model.layers.1.mlp.gate", "weight")
    ]
    wanted = wrapper.get_delta_weight("default")
    torch.testing.assert_close(router.scaling * router.lora_b @ router.lora_a, wanted)


def save(directory: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """Write an adapter's directory by hand."""
    directory.mkdir(exist_ok=True)
    names = ["gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "experts"]
    fields = {"peft_type": "LORA", "r": R, "lora_alpha": 7, "target_modules": names, **config}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    stored = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, directory / "adapter_model.safetensors")
    return directory


def pair(
    name: str, out_features: int, in_features: int, *stack: int, r: int = R
) -> dict[str, Tensor]:
    return {
        f"{name}.lora_A.weight": torch.randn(*stack, r, in_features),
        f"{name}.lora_B.weight": torch.randn(*stack, out_features, r),
    }


def per_expert(
    layer: str,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    experts: Any = range(E),
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for expert in experts:
        tensors |= pair(f"{layer}.{expert}.{names[0]}", WIDTH, H)
        tensors |= pair(f"{layer}.{expert}.{names[1]}", WIDTH, H)
        tensors |= pair(f"{layer}.{expert}.{names[2]}", H, WIDTH)
    return tensors


@pytest.mark.parametrize("kind", MOE_MODELS)
def test_single_experts_as_peft_reads_them(kind: str, tmp_path: Path) -> None:
    """PEFT turns them into fused parameters when it loads them; its result is the oracle."""
    torch.manual_seed(0)
    names, layers = ("gate_proj", "up_proj", "down_proj"), [LAYER, OTHER]
    if kind == "mixtral":
        names = ("w1", "w3", "w2")
        layers = [layer.replace("mlp", "block_sparse_moe") for layer in layers]
    tensors = per_expert(layers[0], names) | per_expert(layers[1], names)
    # PEFT looks target_modules up in the model it fuses: names that are not there it refuses.
    directory = save(tmp_path, tensors, target_modules=list(names))
    adapter = load_adapter(directory)
    assert len(adapter.modules) == 6
    renamed = {name.replace("block_sparse_moe", "mlp"): w for name, w in adapter.modules.items()}
    assert assert_means_the_same(Adapter(renamed), peft_model(tiny_model(kind), directory)) == 4
    assert all(weights.experts == tuple(range(E)) for weights in adapter.modules.values())


def test_some_experts_of_other_ranks_and_scalings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = pair(f"{LAYER}.1.gate_proj", WIDTH, H) | pair(f"{LAYER}.4.gate_proj", WIDTH, H, r=5)
    config = {"rank_pattern": {r"experts\.4\.gate_proj": 5}, "alpha_pattern": {"4.gate_proj": 20}}
    adapter = load_adapter(save(tmp_path, tensors, **config))
    (weights,) = adapter.modules.values()
    assert weights.experts == (1, 4) and weights.rank == 5 and weights.scaling == 4
    wanted = torch.zeros(E, WIDTH, H).double()
    for expert, scaling in ((1, 7 / 3), (4, 20 / 5)):
        name = f"{LAYER}.{expert}.gate_proj"
        lora_a, lora_b = (tensors[f"{name}.lora_{side}.weight"].double() for side in "AB")
        wanted[expert] = scaling * lora_b @ lora_a
    torch.testing.assert_close(delta(weights), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
@pytest.mark.parametrize("is_shared", [False, True])
def test_stacks(names: tuple[str, str, str], is_shared: bool, tmp_path: Path) -> None:
    """Shared ones, given as a stack of one or as equal experts, are kept once."""
    torch.manual_seed(0)
    tensors = pair(f"{LAYER}.{names[0]}", WIDTH, H, E) | pair(f"{LAYER}.{names[2]}", H, WIDTH, E)
    if is_shared:
        gate_a, down_b = f"{LAYER}.{names[0]}.lora_A.weight", f"{LAYER}.{names[2]}.lora_B.weight"
        tensors[gate_a] = tensors[gate_a][:1]
        tensors[down_b] = tensors[down_b][:1].expand(E, -1, -1)
    adapter = load_adapter(save(tmp_path, tensors))
    gate, down = (adapter.modules[f"{LAYER}.{name}"] for name in ("gate_proj", "down_proj"))
    assert len(gate.lora_a) == len(down.lora_b) == (1 if is_shared else E)
    assert len(gate.lora_b) == len(down.lora_a) == E
    for name, weights in ((names[0], gate), (names[2], down)):
        lora_a, lora_b = (tensors[f"{LAYER}.{name}.lora_{side}.weight"].double() for side in "AB")
        wanted = (7 / 3 * lora_b @ lora_a).expand(E, -1, -1)
        torch.testing.assert_close(delta(weights), wanted, rtol=1e-6, atol=1e-6)
    assert adapter.num_bytes == sum(w.lora_a.nbytes + w.lora_b.nbytes for w in (gate, down))


def test_shared_outer_in_the_other_forms(tmp_path: Path) -> None:
    """What is equal in all experts is found in per-expert files and in fused parameters too."""
    torch.manual_seed(0)
    tensors = per_expert(LAYER)
    for expert in range(1, E):
        for name in ("0.gate_proj.lora_A", "0.up_proj.lora_A", "0.down_proj.lora_B"):
            tensors[f"{LAYER}.{expert}{name[1:]}.weight"] = tensors[
                f"{LAYER}.{name}.weight"
            ].clone()
    modules = load_adapter(save(tmp_path / "a", tensors)).modules
    for name, sides in (("gate_proj", (1, E)), ("up_proj", (1, E)), ("down_proj", (E, 1))):
        weights = modules[f"{LAYER}.{name}"]
        assert (len(weights.lora_a), len(weights.lora_b)) == sides

    model = tiny_model("qwen3_moe")
    config = {"r": R, "target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}
    theirs = save_adapter(model, tmp_path / "b", **config)
    before = load_adapter(theirs).modules[f"{LAYER}.gate_up_proj"]
    stored = {
        f"{LAYER}.base_layer.lora_A.weight": before.lora_a[:1].repeat(E, 1, 1).flatten(0, 1),
        f"{LAYER}.base_layer.lora_B.weight": before.lora_b.permute(1, 2, 0).flatten(1),
        f"{LAYER}.lora_A.weight": torch.randn(E * R, WIDTH),
        f"{LAYER}.lora_B.weight": torch.randn(H, R, 1).expand(H, R, E).flatten(1),
    }
    modules = load_adapter(save(tmp_path / "c", stored, **config)).modules
    gate_up, down = modules[f"{LAYER}.gate_up_proj"], modules[f"{LAYER}.down_proj"]
    assert gate_up.lora_a.shape == (1, R, H) and gate_up.lora_b.shape == (E, 2 * WIDTH, R)
    assert torch.equal(gate_up.lora_b, before.lora_b)
    assert down.lora_a.shape == (E, R, WIDTH) and down.lora_b.shape == (1, H, R)


def bad_files() -> list[Any]:
    """(what is wrong, tensors, config, what the message says)"""
    parameters = {"target_parameters": ["gate_up_proj", "down_proj"], "target_modules": []}
    both = {
        f"{LAYER}.base_layer.lora_A.weight": torch.zeros(E * R, H),
        f"{LAYER}.base_layer.lora_B.weight": torch.zeros(2 * WIDTH, E * R),
        f"{LAYER}.lora_A.weight": torch.zeros(E * R, WIDTH),
        f"{LAYER}.lora_B.weight": torch.zeros(H, E * R),
    }
    one = {name: tensor for name, tensor in both.items() if "base_layer" not in name}
    gate = pair(f"{LAYER}.3.gate_proj", WIDTH, H)
    return [
        ("stack and single", gate | pair(f"{LAYER}.gate_proj", WIDTH, H, E), {}, "in two forms"),
        ("single and stack", pair(f"{LAYER}.w1", WIDTH, H, E) | gate, {}, "in two forms"),
        ("two names", gate | pair(f"{LAYER}.3.w1", WIDTH, H), {}, "in two forms"),
        ("fused and halves", both | gate, {**parameters, "target_modules": ["gate_proj"]},
         "two forms, by gate_up_proj and by gate_proj"),
        ("fused and single", both | pair(f"{LAYER}.0.down_proj", H, WIDTH),
         {**parameters, "target_modules": ["down_proj"]}, "in two forms"),
        ("one of two parameters", one, parameters, "1 parameters, .*names gate_up_proj, down_proj"),
        ("two of one parameter", both, {**parameters, "target_parameters": ["down_proj"]},
         "2 parameters, .*names down_proj"),
        ("rank of a parameter", both, {**parameters, "r": 5}, r"expected \[experts \* 5, K\]"),
        ("B of a parameter", {**one, f"{LAYER}.lora_B.weight": torch.zeros(H, R)},
         {**parameters, "target_parameters": ["down_proj"]}, r"lora_B is \[64, 3\], expected"),
        ("experts of other sizes", gate | pair(f"{LAYER}.4.gate_proj", WIDTH + 1, H), {},
         r"differ in N: \[24, 25\]"),
        ("stacks of other sizes", {**pair(f"{LAYER}.w1", WIDTH, H, 4),
         f"{LAYER}.w1.lora_A.weight": torch.randn(3, R, H)}, {}, "stacks of 4 experts"),
        ("a stack elsewhere", pair("model.layers.0.mlp.w1", WIDTH, H, 4), {}, "its rank"),
        ("without its other half", {n: t for n, t in gate.items() if "lora_A" in n}, {}, "alone"),
        ("not targeted", gate, {"target_modules": ["up_proj"]}, "target_modules leaves out"),
        ("not finite", {n: t / 0 for n, t in gate.items()}, {}, "not finite"),
        ("no list", gate, {"target_parameters": "gate_up_proj"}, "is not a list of names"),
    ]  # fmt: skip


@pytest.mark.parametrize("case", bad_files(), ids=lambda case: case[0])
def test_what_is_malformed_is_refused(case: Any, tmp_path: Path) -> None:
    _, tensors, config, message = case
    with pytest.raises(AdapterError, match=message):
        load_adapter(save(tmp_path, tensors, **config))
