"""LoRA adapters as PEFT saves them: read and checked, or refused with a sentence."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import _expert_weights
from ._adapter_files import CONFIG_NAME, read_config, read_tensors
from ._adapter_files import AdapterError as AdapterError
from ._expert_weights import ExpertName
from ._peft_config import ConfigError, PeftLoraConfig

_PREFIX = "base_model.model."
_TENSOR_NAME = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))"
)
_BASE_WEIGHT_NAME = re.compile(r"(?P<module>.+?)(?:\.base_layer)?\.weight")
_WRAPPER = ".base_layer"  # a module in another wrapper of PEFT
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class LoRAWeights(NamedTuple):
    """One module's adapter.

    Attributes:
        lora_a: ``[r, K]``; of an embedding ``[r, V]``; of MoE experts ``[n, r, K]``, or
            ``[1, r, K]`` where they share it.
        lora_b: ``[N, r]``; of an embedding ``[D, r]``; of MoE experts ``[n, N, r]`` or
            ``[1, N, r]``.
        rank: r.
        scaling: factor of the product, alpha / r or alpha / sqrt(r).
        is_embedding: whether ``lora_a`` is looked up rather than multiplied with.
        experts: which of the layer's experts the n are; None: all of them.
    """

    lora_a: Tensor
    lora_b: Tensor
    rank: int
    scaling: float
    is_embedding: bool = False
    experts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Adapter:
    """A checked adapter: the weights per module, by the module's name in the base model.

    Attributes:
        modules: module name -> weights. The experts of an MoE layer are one module for each
            projection, ``...experts.gate_proj``, ``up_proj`` and ``down_proj``, or
            ``gate_up_proj`` where these two share A, whatever form they were saved in.
        base_weights: copies of base weights that PEFT stored beside the adapter (it does so for
            adapted embeddings); the model must have the same.
        source: where it was read from, for messages.

    Raises:
        AdapterError: there is no module, or one whose tensors are malformed.
    """

    modules: Mapping[str, LoRAWeights]
    base_weights: Mapping[str, Tensor] = field(default_factory=dict)
    source: str = "adapter"

    def __post_init__(self) -> None:
        if not self.modules:
            raise AdapterError(f"{self.source}: it has no LoRA weights")
        for name, weights in self.modules.items():
            try:
                _check_weights(weights)
            except ValueError as error:
                raise AdapterError(f"{self.source}: module {name!r}: {error}") from None

    @property
    def max_rank(self) -> int:
        """The highest rank of a module."""
        return max(weights.rank for weights in self.modules.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of A and B of all modules."""
        return sum(w.lora_a.nbytes + w.lora_b.nbytes for w in self.modules.values())


def load_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read a directory that PEFT's ``save_pretrained`` wrote.

    Weights come from adapter_model.safetensors, else from adapter_model.bin, of which only tensors
    are unpickled. Files are read once and in full; they may change afterwards.

    Raises:
        AdapterError: something is missing, malformed or not supported; the message names it.
    """
    directory = Path(path)
    try:
        if not directory.is_dir():
            raise AdapterError(f"{directory}: there is no such directory")
        config = PeftLoraConfig.parse(read_config(directory))
        modules, base_weights = _group(read_tensors(directory), config, directory)
        return Adapter(modules, base_weights, source=str(directory))
    except ConfigError as error:
        raise AdapterError(f"{directory / CONFIG_NAME}: {error}") from error
    except OSError as error:
        raise AdapterError(f"{directory}: it cannot be read: {error}") from error


def _group(
    tensors: Mapping[str, Tensor], config: PeftLoraConfig, directory: Path
) -> tuple[dict[str, LoRAWeights], dict[str, Tensor]]:
    """Sort tensors into pairs of A and B per module, and base weights."""
    sides: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    base_weights: dict[str, Tensor] = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix(_PREFIX)
        if match := _TENSOR_NAME.fullmatch(name):
            module = match["module"]
            if match["embedding"]:
                embeddings.add(module)
            side = sides.setdefault(module, {})
            letter = match["linear"] or match["embedding"]
            if letter in side:
                raise AdapterError(
                    f"{directory}: module {module!r} has two tensors for lora_{letter}"
                )
            side[letter] = tensor
        elif (match := _BASE_WEIGHT_NAME.fullmatch(name)) and "lora_" not in name:
            base_weights[match["module"]] = tensor
        else:
            raise AdapterError(
                f"{directory}: the weights have {full_name!r}, which is no plain LoRA weight"
            )

    modules: dict[str, LoRAWeights] = {}
    for module, side in sides.items():
        parameter = _parameter_of(module, sides, config, directory)
        if parameter is None and not config.targets(module):
            raise AdapterError(
                f"{directory}: there are weights for {module!r}, which target_modules leaves out"
            )
        if len(side) != 2:
            raise AdapterError(
                f"{directory}: module {module!r} has lora_{next(iter(side))} alone, without its "
                "other half"
            )
        if parameter is None:
            name, weights = module, _of_module(module, side, config, directory)
        else:
            name, weights = _of_parameter(_unwrapped(module), parameter, side, config, directory)
        modules[name] = weights._replace(is_embedding=module in embeddings)
    return _stack_experts(modules, directory), base_weights


def _parameter_of(
    module: str, sides: Mapping[str, object], config: PeftLoraConfig, directory: Path
) -> str | None:
    """Return the parameter that a wrapper of PEFT adapts; None: it adapts the module itself."""
    inner = _unwrapped(module)
    parameters = config.parameters_of(inner)
    if not parameters:
        return None
    num_wrappers = sum(_unwrapped(other) == inner for other in sides)
    if num_wrappers != len(parameters):
        raise AdapterError(
            f"{directory}: {inner!r} has the weights of {num_wrappers} parameters, but "
            f"target_parameters names {', '.join(parameters)}"
        )
    return parameters[-1 - module[len(inner) :].count(_WRAPPER)]


def _unwrapped(module: str) -> str:
    while module.endswith(_WRAPPER):
        module = module.removesuffix(_WRAPPER)
    return module


def _of_module(
    module: str, side: Mapping[str, Tensor], config: PeftLoraConfig, directory: Path
) -> LoRAWeights:
    rank = config.rank_of(module)
    lora_a = side["A"]
    may_be_stack = ExpertName.parse(module) is not None
    if lora_a.dim() not in ((2, 3) if may_be_stack else (2,)) or lora_a.shape[-2] != rank:
        raise AdapterError(
            f"{directory}: module {module!r} has lora_A {list(lora_a.shape)}, but its rank "
            f"in {CONFIG_NAME} is {rank}"
        )
    return LoRAWeights(lora_a, side["B"], rank, config.scaling_of(module))


def _of_parameter(
    module: str,
    parameter: str,
    side: Mapping[str, Tensor],
    config: PeftLoraConfig,
    directory: Path,
) -> tuple[str, LoRAWeights]:
    """Return the weights of a parameter that was adapted by its name, and what they adapt."""
    name = f"{module}.{parameter}"
    rank, scaling = config.rank_of(name), config.scaling_of(name)
    if parameter == "weight":  # as if the module were adapted
        return module, LoRAWeights(side["A"], side["B"], rank, scaling)
    try:
        lora_a, lora_b = _expert_weights.of_parameter(side["A"], side["B"], rank)
    except ValueError as error:
        raise AdapterError(f"{directory}: {name!r}: {error}") from None
    return name, LoRAWeights(lora_a, lora_b, rank, scaling)


def _stack_experts(modules: Mapping[str, LoRAWeights], directory: Path) -> dict[str, LoRAWeights]:
    """Bring the adapters of experts into one form: a stack under the name of its projection."""
    whole: dict[str, LoRAWeights] = {}
    single: dict[str, dict[int, LoRAWeights]] = {}
    for module, weights in modules.items():
        name = ExpertName.parse(module)
        if name is None or (name.expert is None and weights.lora_a.dim() == 2):
            whole[module] = weights
            continue
        experts = single.setdefault(name.projection, {})
        if name.projection in whole or name.expert in experts or (name.expert is None and experts):
            raise AdapterError(
                f"{directory}: {name.projection!r} is adapted in two forms, one of them by "
                f"{module!r}: expected one"
            )
        if name.expert is not None:
            experts[name.expert] = weights
        else:
            whole[name.projection] = weights._replace(
                lora_a=_expert_weights.shared(weights.lora_a),
                lora_b=_expert_weights.shared(weights.lora_b),
            )
    for projection, experts in single.items():
        if experts:
            whole[projection] = _stack(projection, experts, directory)
    for module in whole:
        layer, _, projection = module.rpartition(".")
        if projection == "gate_up_proj":
            for half in ("gate_proj", "up_proj"):
                if f"{layer}.{half}" in whole:
                    raise AdapterError(
                        f"{directory}: {layer!r} is adapted in two forms, by gate_up_proj and by "
                        f"{half}: expected one"
                    )
    return whole


def _stack(projection: str, experts: Mapping[int, LoRAWeights], directory: Path) -> LoRAWeights:
    """Stack the adapters of single experts."""
    indices = tuple(sorted(experts))
    sides = [(experts[i].lora_a, experts[i].lora_b, experts[i].scaling) for i in indices]
    try:
        for index in indices:
            _check_weights(experts[index])
        stack = _expert_weights.of_experts(sides)
    except ValueError as error:
        raise AdapterError(f"{directory}: module {projection!r}: {error}") from None
    return LoRAWeights(
        stack.lora_a, stack.lora_b, stack.lora_a.shape[1], stack.scaling, experts=indices
    )


def _check_weights(weights: LoRAWeights) -> None:
    """Raise ValueError where the tensors of one module do not fit together."""
    lora_a, lora_b, rank, scaling = weights[:4]
    shapes = f"A is {list(lora_a.shape)} and B is {list(lora_b.shape)}"
    if rank < 1 or lora_a.dim() not in (2, 3) or lora_b.dim() != lora_a.dim():
        raise ValueError(
            f"{shapes} for rank {rank}, expected [r, K] and [N, r] with r >= 1, or stacks of them"
        )
    if lora_a.shape[-2] != rank or lora_b.shape[-1] != rank:
        raise ValueError(f"{shapes}, expected [{rank}, K] and [N, {rank}]")
    if lora_a.dim() == 3:
        sizes = lora_a.shape[0], lora_b.shape[0]
        n = max(sizes) if weights.experts is None else len(weights.experts)
        if not {*sizes} <= {1, n}:
            raise ValueError(f"{shapes}, expected stacks of {n} experts, or of 1 for all")
    for side, tensor in (("A", lora_a), ("B", lora_b)):
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{side} is of {tensor.dtype}, expected one of {_DTYPES}")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{side} is {tensor.layout} on {tensor.device}, expected plain values")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{side} has values that are not finite")
    if not math.isfinite(scaling):
        raise ValueError(f"its scaling is {scaling}")
