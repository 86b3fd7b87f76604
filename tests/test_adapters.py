"""load_adapter: PEFT's directories are read as PEFT reads them, or refused with a sentence."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_ext import Adapter, AdapterError, load_adapter
from lora_ext.adapters import LoRAWeights

Q_PROJ = "model.layers.0.self_attn.q_proj"
PREFIX = "base_model.model."


def make_tensors(rank: int = 2) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{Q_PROJ}.lora_A.weight": torch.randn(rank, 8),
        f"{PREFIX}{Q_PROJ}.lora_B.weight": torch.randn(6, rank),
    }


def make_directory(
    directory: Path, tensors: dict[str, Tensor] | None = None, **config: Any
) -> Path:
    """Write a small adapter by hand, as PEFT lays it out."""
    directory.mkdir(exist_ok=True)
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors or make_tensors(), directory / "adapter_model.safetensors")
    return directory


def test_every_module_has_the_rank_and_scaling_that_peft_gives_it(tmp_path: Path) -> None:
    from tiny_models import ADAPTERS, peft_model, save_adapters, tiny_model

    model = tiny_model()
    for name, directory in save_adapters(model, tmp_path).items():
        adapter = load_adapter(directory)
        theirs = {
            key.removeprefix(PREFIX): module
            for key, module in peft_model(model, directory).named_modules()
            if hasattr(module, "lora_A") and module.scaling
        }
        assert adapter.modules.keys() == theirs.keys(), name
        for key, module in theirs.items():
            ours = adapter.modules[key]
            assert ours.scaling == module.scaling["default"]
            assert ours.rank == module.r["default"]
            if ours.is_embedding:
                sides = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
            else:
                sides = module.lora_A["default"].weight, module.lora_B["default"].weight
            assert torch.equal(ours.lora_a, sides[0]) and torch.equal(ours.lora_b, sides[1])
    assert len(ADAPTERS) == 5


def test_what_it_returns(tmp_path: Path) -> None:
    tensors = make_tensors(rank=3)
    adapter = load_adapter(
        make_directory(tmp_path / "a", tensors, rank_pattern={"q_proj": 3}, use_rslora=True)
    )
    (weights,) = adapter.modules.values()
    assert adapter.modules.keys() == {Q_PROJ}
    assert weights.rank == adapter.max_rank == 3
    assert weights.scaling == 4 / 3**0.5
    assert adapter.num_bytes == 4 * 3 * (8 + 6)
    assert str(tmp_path / "a") == adapter.source


def test_files_may_change_afterwards(tmp_path: Path) -> None:
    tensors = make_tensors()
    adapter = load_adapter(make_directory(tmp_path, tensors))
    with open(tmp_path / "adapter_model.safetensors", "r+b") as file:
        file.write(bytes(os.path.getsize(file.name)))
        file.truncate(10)
    assert torch.equal(adapter.modules[Q_PROJ].lora_a, next(iter(tensors.values())))


def test_pickles_of_tensors_alone(tmp_path: Path) -> None:
    tensors = make_tensors()
    directory = make_directory(tmp_path, tensors)
    (directory / "adapter_model.safetensors").unlink()
    torch.save(tensors, directory / "adapter_model.bin")
    adapter = load_adapter(directory)
    assert torch.equal(adapter.modules[Q_PROJ].lora_a, next(iter(tensors.values())))


class Touch:
    """A pickle that would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def plain_pickle(data: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(data, protocol=2))


@pytest.mark.parametrize("write", [torch.save, plain_pickle])
def test_other_pickles_are_not_run(write: Callable[[Any, Path], None], tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "a")
    (directory / "adapter_model.safetensors").unlink()
    write({"weight": Touch(tmp_path / "made")}, directory / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model.bin: it is not a pickle of tensors"):
        load_adapter(directory)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "field",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"layer_replication": [[0, 1], [0, 1]]},
        {"alora_invocation_tokens": [1, 2]},
        {"target_parameters": ["experts.gate_up_proj_bias"]},
        {"trainable_token_indices": [3]},
        {"trainable_token_indices": {"embed_tokens": [3]}},
        {"megatron_config": {"a": 1}},
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
        {"arrow_config": {"top_k": 3}},
        {"kasa_config": {"beta": 1.0}},
        {"monteclora_config": {"num_samples": 8}},
        {"ensure_weight_tying": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": 1.5},
        {"a_field_of_tomorrow": "on"},
        {"peft_type": "ADALORA"},
        {"peft_type": "IA3"},
        {"peft_type": None},
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(field: dict[str, Any], tmp_path: Path) -> None:
    (name,) = field
    with pytest.raises(AdapterError, match=rf"adapter_config.json: {name} "):
        load_adapter(make_directory(tmp_path, **field))


@pytest.mark.parametrize(
    "field",
    [
        {"init_lora_weights": init}
        for init in (None, True, False, "gaussian", "eva", "orthogonal", "mica")
    ]
    + [
        {"lora_dropout": 0.5},
        {"fan_in_fan_out": True},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.q_proj"},
        {"target_modules": None},
        {"target_modules": [Q_PROJ]},
        {"exclude_modules": ["k_proj"]},
        {"a_field_of_tomorrow": None, "another": False, "third": []},
        {"use_dora": False, "modules_to_save": []},
    ],
    ids=str,
)
def test_what_does_not_change_the_result_is_accepted(field: dict[str, Any], tmp_path: Path) -> None:
    adapter = load_adapter(make_directory(tmp_path, **field))
    assert adapter.modules[Q_PROJ].scaling == 2.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 0}, "r = 0 is not a rank"),
        ({"r": True}, "r = True is not a rank"),
        ({"r": "8"}, "r = '8' is not a rank"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] = 0 is not a rank"),
        ({"rank_pattern": ["q_proj"]}, "is not an object"),
        ({"rank_pattern": {"(": 2}}, "is malformed"),
        ({"rank_pattern": {"a" * 2000: 2}}, "pattern of 2000 characters"),
        ({"rank_pattern": {"q_proj": 4}}, r"lora_A \[2, 8\], but its rank in .* is 4"),
        ({"alpha_pattern": {"q_proj": "x"}}, "is not a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan is not a finite number"),
        ({"lora_alpha": float("inf")}, "lora_alpha = inf is not a finite number"),
        ({"lora_alpha": 10**400}, "is not a finite number"),
        ({"lora_alpha": None}, "lora_alpha = None"),
        ({"use_rslora": "yes"}, "use_rslora = 'yes'"),
        ({"target_modules": ["v_proj"]}, "which target_modules leaves out"),
        ({"target_modules": r".*v_proj"}, "which target_modules leaves out"),
        ({"exclude_modules": ["q_proj"]}, "which target_modules leaves out"),
        ({"target_modules": {"q_proj": 1}}, "neither a pattern nor a list"),
        ({"target_modules": "("}, "is malformed"),
    ],
)
def test_malformed_config(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        load_adapter(make_directory(tmp_path, **config))


A, B = make_tensors()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({B: None}, "has lora_A alone"),
        ({A: None}, "has lora_B alone"),
        ({A: torch.zeros(3, 8)}, r"lora_A \[3, 8\], but its rank"),
        ({A: torch.zeros(2, 8, 1)}, r"lora_A \[2, 8, 1\]"),
        ({B: torch.zeros(6, 3)}, r"B is \[6, 3\], expected"),
        ({B: torch.zeros(12)}, r"B is \[12\]"),
        ({A: torch.zeros(2, 8, dtype=torch.int8)}, "A is of torch.int8"),
        ({A: torch.zeros(2, 8).to(torch.float8_e4m3fn)}, "A is of torch.float8"),
        ({A: torch.full((2, 8), float("nan"))}, "A has values that are not finite"),
        ({B: torch.full((6, 2), float("inf"))}, "B has values that are not finite"),
        ({f"{PREFIX}{Q_PROJ}.lora_magnitude_vector": torch.ones(6)}, "no plain LoRA weight"),
        ({f"{PREFIX}{Q_PROJ}.lora_B.bias": torch.ones(6)}, "no plain LoRA weight"),
        ({f"{PREFIX}{Q_PROJ}.lora_E": torch.ones(6)}, "no plain LoRA weight"),
        ({f"{Q_PROJ}.lora_A.weight": torch.ones(2, 8)}, "two tensors for lora_A"),
        ({f"{PREFIX}{Q_PROJ}.lora_embedding_A": torch.ones(2, 8)}, "two tensors for lora_A"),
        ({"../../etc.lora_A.weight": torch.ones(2, 8)}, "which target_modules leaves out"),
        ({A: None, B: None, f"{PREFIX}lm_head.weight": torch.ones(2)}, "has no LoRA weights"),
    ],
)
def test_malformed_weights(change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    tensors = {**make_tensors(), **change}
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(AdapterError, match=message):
        load_adapter(make_directory(tmp_path, given))


def truncated(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def pickled_as_safetensors(directory: Path) -> None:
    torch.save(make_tensors(), directory / "adapter_model.safetensors")


def linked_out(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.rename(directory.parent / "elsewhere.safetensors")
    path.symlink_to(directory.parent / "elsewhere.safetensors")


def config_linked_out(directory: Path) -> None:
    path = directory / "adapter_config.json"
    path.rename(directory.parent / "elsewhere.json")
    path.symlink_to("../elsewhere.json")


def replaced_by(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(content) and None


def without(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def pipe(directory: Path) -> None:
    without("adapter_model.safetensors")(directory)
    os.mkfifo(directory / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncated, "not a complete safetensors file"),
        (pickled_as_safetensors, "not a complete safetensors file"),
        (replaced_by("adapter_model.safetensors", b""), "not a complete safetensors file"),
        (replaced_by("adapter_model.safetensors", b"\xff" * 64), "not a complete safetensors file"),
        (without("adapter_model.safetensors"), "adapter_model.safetensors: there is no such file"),
        (pipe, "there is no such file"),
        (linked_out, "link out of the directory"),
        (config_linked_out, "link out of the directory"),
        (without("adapter_config.json"), "adapter_config.json: there is no such file"),
        (replaced_by("adapter_config.json", b"{"), "not valid JSON"),
        (replaced_by("adapter_config.json", b"\xff\xfe\x00"), "not valid JSON"),
        (replaced_by("adapter_config.json", b"[" * 100_000), "not valid JSON"),
        (replaced_by("adapter_config.json", b"[]"), "holds no JSON object"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_spoilt_files(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "adapter")
    spoil(directory)
    with pytest.raises(AdapterError, match=message):
        load_adapter(directory)


def test_no_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "none", __file__, "organisation/on-a-hub"):
        with pytest.raises(AdapterError, match="there is no such directory"):
            load_adapter(path)


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs = make_directory(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert load_adapter(snapshot).modules.keys() == {Q_PROJ}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (LoRAWeights(torch.zeros(2, 8), torch.zeros(6, 3), 2, 1.0), r"expected \[2, K\]"),
        (LoRAWeights(torch.zeros(2, 8), torch.zeros(6, 2), 4, 1.0), r"expected \[4, K\]"),
        (LoRAWeights(torch.zeros(0, 8), torch.zeros(6, 0), 0, 1.0), "r >= 1"),
        (LoRAWeights(torch.zeros(2, 8), torch.zeros(6, 2), 2, float("nan")), "scaling is nan"),
        (LoRAWeights(torch.zeros(2, 8).to_sparse(), torch.zeros(6, 2), 2, 1.0), "A is .*sparse"),
        (LoRAWeights(torch.zeros(2, 8, device="meta"), torch.zeros(6, 2), 2, 1.0), "A is .*meta"),
    ],
)
def test_adapters_made_by_hand_are_checked_too(weights: LoRAWeights, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        Adapter({"layer": weights})
