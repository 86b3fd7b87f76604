"""LoRA adapters as PEFT saves them: read and checked, or refused with a sentence."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ._peft_config import ConfigError, PeftLoraConfig

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

_PREFIX = "base_model.model."
_TENSOR_NAME = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))"
)
_BASE_WEIGHT_NAME = re.compile(r"(?P<module>.+?)(?:\.base_layer)?\.weight")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_MAX_CONFIG_BYTES = 16 << 20


class AdapterError(ValueError):
    """An adapter that cannot be applied; the message says which part of it and why."""


class LoRAWeights(NamedTuple):
    """One module's adapter.

    Attributes:
        lora_a: ``[r, K]``; of an embedding ``[r, V]``.
        lora_b: ``[N, r]``; of an embedding ``[D, r]``.
        rank: r.
        scaling: factor of the product, alpha / r or alpha / sqrt(r).
        is_embedding: whether ``lora_a`` is looked up rather than multiplied with.
    """

    lora_a: Tensor
    lora_b: Tensor
    rank: int
    scaling: float
    is_embedding: bool = False


@dataclass(frozen=True)
class Adapter:
    """A checked adapter: the weights per module, by the module's name in the base model.

    Attributes:
        modules: module name -> weights.
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
        config = PeftLoraConfig.parse(_read_config(directory))
        modules, base_weights = _group(_read_tensors(directory), config, directory)
        return Adapter(modules, base_weights, source=str(directory))
    except ConfigError as error:
        raise AdapterError(f"{directory / CONFIG_NAME}: {error}") from error
    except OSError as error:
        raise AdapterError(f"{directory}: it cannot be read: {error}") from error


def _read_file(directory: Path, name: str) -> bytes:
    """Read a regular file of the directory; links may lead to its own files or a hub cache's."""
    target = (directory / name).resolve()
    root = directory.resolve()
    if root.parent.name == "snapshots":  # huggingface_hub: snapshots/<revision>/ links to blobs/
        root = root.parent.parent
    if not target.is_relative_to(root):
        raise AdapterError(f"{directory / name}: it is a link out of the directory, to {target}")
    if not target.is_file():
        raise AdapterError(f"{directory / name}: there is no such file")
    return target.read_bytes()


def _read_config(directory: Path) -> dict[str, object]:
    data = _read_file(directory, CONFIG_NAME)
    if len(data) > _MAX_CONFIG_BYTES:
        raise AdapterError(f"{directory / CONFIG_NAME}: it has {len(data)} bytes")
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{directory / CONFIG_NAME}: it is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{directory / CONFIG_NAME}: it holds no JSON object")
    return config


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    if (directory / SAFETENSORS_NAME).exists() or not (directory / PICKLE_NAME).exists():
        return _read_safetensors(directory)
    return _read_pickle(directory)


def _read_safetensors(directory: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = _read_file(directory, SAFETENSORS_NAME)
    try:
        return load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise AdapterError(
            f"{directory / SAFETENSORS_NAME}: it is not a complete safetensors file: {error}"
        ) from error


def _read_pickle(directory: Path) -> dict[str, Tensor]:
    import io

    data = _read_file(directory, PICKLE_NAME)
    try:
        tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise AdapterError(
            f"{directory / PICKLE_NAME}: it is not a pickle of tensors alone: {reason}"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items()
    ):
        raise AdapterError(f"{directory / PICKLE_NAME}: it holds something else than named tensors")
    return tensors


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
        if not config.targets(module):
            raise AdapterError(
                f"{directory}: there are weights for {module!r}, which target_modules leaves out"
            )
        if len(side) != 2:
            raise AdapterError(
                f"{directory}: module {module!r} has lora_{next(iter(side))} alone, without its "
                "other half"
            )
        rank = config.rank_of(module)
        if side["A"].dim() != 2 or side["A"].shape[0] != rank:
            raise AdapterError(
                f"{directory}: module {module!r} has lora_A {list(side['A'].shape)}, but its rank "
                f"in {CONFIG_NAME} is {rank}"
            )
        modules[module] = LoRAWeights(
            side["A"], side["B"], rank, config.scaling_of(module), module in embeddings
        )
    return modules, base_weights


def _check_weights(weights: LoRAWeights) -> None:
    """Raise ValueError where the tensors of one module do not fit together."""
    lora_a, lora_b, rank, scaling, _ = weights
    if rank < 1 or lora_a.dim() != 2 or lora_b.dim() != 2:
        raise ValueError(
            f"A is {list(lora_a.shape)} and B is {list(lora_b.shape)} for rank {rank}, expected "
            "[r, K] and [N, r] with r >= 1"
        )
    if lora_a.shape[0] != rank or lora_b.shape[1] != rank:
        raise ValueError(
            f"A is {list(lora_a.shape)} and B is {list(lora_b.shape)}, expected [{rank}, K] and "
            f"[N, {rank}]"
        )
    for side, tensor in (("A", lora_a), ("B", lora_b)):
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{side} is of {tensor.dtype}, expected one of {_DTYPES}")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{side} is {tensor.layout} on {tensor.device}, expected plain values")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{side} has values that are not finite")
    if not math.isfinite(scaling):
        raise ValueError(f"its scaling is {scaling}")
