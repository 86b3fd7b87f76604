"""What PEFT's adapter_config.json says about a LoRA adapter, or why it cannot be applied."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

Number = TypeVar("Number", int, float)

# Fields that change what the adapter computes in a way that the ops do not do.
_UNSUPPORTED = {
    "alora_invocation_tokens": "activated LoRA switches on at a token sequence",
    "arrow_config": "Arrow routes tokens between adapters",
    "ensure_weight_tying": "tied adapters of embedding and lm_head are derived, not stored",
    "kasa_config": "KaSA truncates the base weights",
    "layer_replication": "it runs some layers of the model twice",
    "lora_bias": "a bias on lora_B is not applied",
    "megatron_config": "its layers are those of Megatron",
    "modules_to_save": "whole modules are replaced, not adapted",
    "monteclora_config": "MonteCLoRA samples around the adapter",
    "trainable_token_indices": "single rows of the embedding are replaced",
    "use_bdlora": "block-diagonal factors are stored in another layout",
    "use_dora": "DoRA rescales base and adapter together; merge it into a model instead",
    "use_qalora": "QA-LoRA pools the input features",
}

# Fields with no influence on what a stored adapter computes. fan_in_fan_out concerns how the base
# weight is stored: A is [r, K] and B is [N, r] either way.
_WITHOUT_INFLUENCE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        "velora_config",
    }
)

_READ = frozenset(
    {
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "target_parameters",
        "use_rslora",
    }
)

# Other initialisations subtract something from the base weights, also when PEFT loads the adapter.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")

# Parameters that may be adapted by their own names: those of all experts of an MoE layer, in the
# order in which the module defines them, which is the order in which PEFT nests its wrappers, and
# the weight of any other module.
_EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
_PARAMETERS = (*_EXPERT_PARAMETERS, "weight")

_MAX_PATTERN_LENGTH = 1000


class ConfigError(ValueError):
    """The configuration is malformed, or asks for something that is not supported."""


@dataclass(frozen=True)
class PeftLoraConfig:
    """The fields that decide which modules have which rank and scaling."""

    rank: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    target_parameters: tuple[str, ...] = ()

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> PeftLoraConfig:
        """Check every field of a parsed adapter_config.json.

        Raises:
            ConfigError: it is not one of LoRA, is malformed, or has a field that changes the
                result in a way that is not supported; the message names the field and its value.
        """
        peft_type = config.get("peft_type")
        if peft_type != "LORA":
            raise ConfigError(f"peft_type is {peft_type!r}, only 'LORA' is supported")
        for name, value in config.items():
            if name in _UNSUPPORTED:
                if value:
                    raise ConfigError(
                        f"{name} = {_shown(value)} is not supported: {_UNSUPPORTED[name]}"
                    )
            elif value and name not in _READ and name not in _WITHOUT_INFLUENCE:
                raise ConfigError(
                    f"{name} = {_shown(value)} is not known, so it cannot be told whether it "
                    "changes the result"
                )
        bias = config.get("bias", "none")
        if bias != "none":
            raise ConfigError(f"bias = {_shown(bias)} is not supported: trained biases are dropped")
        init = config.get("init_lora_weights")
        if not any(init is plain or (init and init == plain) for plain in _PLAIN_INITS):
            raise ConfigError(
                f"init_lora_weights = {_shown(init)} is not supported: it changes the base "
                "weights; convert the adapter with PEFT's "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )
        use_rslora = config.get("use_rslora", False)
        if not isinstance(use_rslora, bool):
            raise ConfigError(f"use_rslora = {_shown(use_rslora)} is not true or false")
        ranks = _patterns("rank_pattern", config)
        alphas = _patterns("alpha_pattern", config)
        return cls(
            rank=_rank("r", config.get("r", 8)),
            alpha=_alpha("lora_alpha", config.get("lora_alpha", 8)),
            use_rslora=use_rslora,
            rank_pattern={key: _rank(f"rank_pattern[{key!r}]", v) for key, v in ranks.items()},
            alpha_pattern={key: _alpha(f"alpha_pattern[{key!r}]", v) for key, v in alphas.items()},
            target_modules=_names("target_modules", config),
            exclude_modules=_names("exclude_modules", config),
            target_parameters=_parameters(config),
        )

    def rank_of(self, module: str) -> int:
        """Return the rank of the module named ``module`` in the base model."""
        return _first_match(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """Return alpha / r of the module, or alpha / sqrt(r) with rsLoRA."""
        rank = self.rank_of(module)
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether PEFT would apply the adapter to the module of this name."""
        if self.exclude_modules is not None and _selects(self.exclude_modules, module):
            return False
        return (
            self.target_modules is None
            or self.target_modules == "all-linear"
            or _selects(self.target_modules, module)
        )

    def parameters_of(self, module: str) -> list[str]:
        """The parameters of the module that PEFT would wrap by their names, innermost first."""
        is_experts = module.rpartition(".")[2] == "experts"
        names = _EXPERT_PARAMETERS if is_experts else ("weight",)
        return [name for name in names if self._targets_parameter(f"{module}.{name}")]

    def _targets_parameter(self, name: str) -> bool:
        return any(name == t or name.endswith(f".{t}") for t in self.target_parameters)


def _first_match(patterns: Mapping[str, Number], module: str, default: Number) -> Number:
    """PEFT's rule: the first pattern that matches the end of the name, from a dot on."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _selects(names: str | tuple[str, ...], module: str) -> bool:
    """PEFT's rule: a string is a regular expression, a list holds names or their last parts."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _rank(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} = {_shown(value)} is not a rank, expected a whole number >= 1")
    return value


def _alpha(name: str, value: object) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30:
        return float(value)
    raise ConfigError(f"{name} = {_shown(value)} is not a finite number")


def _compiles(name: str, pattern: str) -> None:
    if len(pattern) > _MAX_PATTERN_LENGTH:
        raise ConfigError(f"{name} has a pattern of {len(pattern)} characters")
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"{name} has the pattern {_shown(pattern)}, which is malformed: {error}"
        ) from error


def _patterns(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise ConfigError(f"{name} = {_shown(patterns)} is not an object of pattern: value")
    for pattern in patterns:
        _compiles(name, pattern)
    return patterns


def _names(name: str, config: Mapping[str, Any]) -> str | tuple[str, ...] | None:
    names = config.get(name)
    if not names:
        return None
    if isinstance(names, str):
        if names != "all-linear":
            _compiles(name, names)
        return names
    if isinstance(names, list) and all(isinstance(entry, str) for entry in names):
        return tuple(names)
    raise ConfigError(f"{name} = {_shown(names)} is neither a pattern nor a list of names")


def _parameters(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get("target_parameters") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"target_parameters = {_shown(names)} is not a list of names")
    for name in names:
        if name.rpartition(".")[2] not in _PARAMETERS:
            raise ConfigError(
                f"target_parameters = {_shown(names)} is not supported: by their names, only "
                f"{', '.join(_PARAMETERS)} can be adapted"
            )
    return tuple(names)
