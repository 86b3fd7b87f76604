"""The files of an adapter's directory, read once and in full, as data that is not trusted."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch
from torch import Tensor

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

_MAX_CONFIG_BYTES = 16 << 20


class AdapterError(ValueError):
    """An adapter that cannot be applied; the message says which part of it and why."""


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


def read_config(directory: Path) -> dict[str, object]:
    """Read adapter_config.json; AdapterError where it is no JSON object."""
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


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Read the weights by their names; AdapterError where there are none that are safe to read."""
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
