"""Small random transformers models, adapters that PEFT makes for them, and PEFT's own results."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

# What the adapters of the tests have in common with each other is nothing but the model.
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "everything": {
        "r": 8,
        "lora_alpha": 16,
        "use_rslora": True,
        "target_modules": [*ATTENTION, *MLP, "embed_tokens", "lm_head"],
    },
    "patterns": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": [*ATTENTION, *MLP],
        # The first that matches counts; PEFT saves them sorted, so they are sorted here.
        "rank_pattern": {r".*\.1\.mlp\.\w+": 6, "down_proj": 1, "layers.0.self_attn.q_proj": 12},
        "alpha_pattern": {"up_proj": 11, "self_attn.o_proj": 2},
    },
    "head": {"r": 2, "lora_alpha": 4, "target_modules": ["lm_head"]},
    "embedding": {"r": 5, "lora_alpha": 9, "target_modules": ["embed_tokens"]},
}
MAX_RANK = 16

_CONFIGS = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "qwen3_moe": "Qwen3MoeConfig",
    "mixtral": "MixtralConfig",
    "gpt_oss": "GptOssConfig",
}
_MOE_VALUES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2},
    "mixtral": {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2},
    "gpt_oss": {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2},
}
MOE_MODELS = ["qwen3_moe", "mixtral"]
MODELS = [kind for kind in _CONFIGS if kind not in _MOE_VALUES]


def tiny_model(
    kind: str = "llama", device: str = "cpu", dtype: torch.dtype = torch.float32, **config: Any
) -> Any:
    """Make a causal LM of two layers with the same random weights every time."""
    values = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        **_MOE_VALUES.get(kind, {}),
    }
    made = getattr(transformers, _CONFIGS[kind])(**{**values, **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(made)
        if kind == "gpt_oss":  # whose biases start as zeros
            for name, parameter in model.named_parameters():
                if "bias" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
    return model.to(device=device, dtype=dtype).eval()


def save_adapter(model: Any, directory: Path, *, seed: int = 0, **config: Any) -> Path:
    """Let PEFT make an adapter with random weights and save it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on tied and on stored embeddings
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                values = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.data.copy_(values)
        adapted.save_pretrained(str(directory))
    return directory


def save_adapters(model: Any, directory: Path) -> dict[str, Path]:
    """Save each of ``ADAPTERS``."""
    return {
        name: save_adapter(model, directory / name, seed=seed, **config)
        for seed, (name, config) in enumerate(ADAPTERS.items())
    }


def peft_model(model: Any, directory: Path | None) -> Any:
    """Return a model with one adapter as PEFT loads it; without one, a copy of the base model."""
    base = copy.deepcopy(model)
    if directory is None:
        return base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, str(directory)).eval()


def assert_agrees(ours: Tensor, theirs: Tensor) -> None:
    """Both compute in float32, in another order: a few units in the last place, no more."""
    error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    assert error < 3e-6, f"relative error {error:.2e}"
