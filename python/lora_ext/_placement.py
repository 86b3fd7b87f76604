"""Where an adapter goes: checked against a model's layers, and cut to what they hold of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .adapters import Adapter, AdapterError, LoRAWeights
from .layers import LoRAEmbedding, LoRAModule, LoRASlice, LoRAVocabParallelEmbedding


class PlacedRows(NamedTuple):
    """Rows ``[x, D]`` that an adapter has for the tokens it adds to an embedding."""

    layer: LoRAVocabParallelEmbedding
    rows: Tensor


class PlacedWeights(NamedTuple):
    """One layer's part of an adapter, in its dtype and on its device."""

    layer: LoRAModule
    lora_a: Tensor
    lora_b: Tensor
    rank: int
    scaling: float


class Placement(NamedTuple):
    """What an adapter has for each layer."""

    weights: list[PlacedWeights]
    added_rows: list[PlacedRows]


def place(adapter: Adapter, targets: Mapping[str, LoRASlice], max_rank: int) -> Placement:
    """Check a whole adapter and bring each layer's part to its device and dtype; writes nothing.

    Args:
        adapter: what to place.
        targets: layer, or one slice of it, by the name that adapters use.
        max_rank: the highest rank that layers take.

    Raises:
        AdapterError: it does not fit; the same on all ranks of a group.
    """
    parts: dict[LoRAModule, list[LoRAWeights | None]] = {}
    for name, weights in adapter.modules.items():
        where = f"{adapter.source}: module {name!r}"
        target = targets.get(name)
        if target is None:
            raise AdapterError(f"{where}: the model has no layer of this name that takes adapters")
        weights = _checked(where, target, weights, max_rank)
        of_layer = parts.setdefault(target.layer, [None] * len(target.layer.outputs))
        for index, part in _of_slices(target, weights):
            if of_layer[index] is not None:
                raise AdapterError(f"{where}: another module has weights for the same projection")
            of_layer[index] = part
    added_rows = [
        _check_base_weight(adapter.source, name, targets.get(name), tensor)
        for name, tensor in adapter.base_weights.items()
    ]
    return Placement(
        [_place(layer, of_layer) for layer, of_layer in parts.items()],
        [placed for placed in added_rows if placed is not None],
    )


def stack(parts: Sequence[LoRAWeights | None], sizes: Sequence[int]) -> LoRAWeights:
    """Stack the projections of a layer, some of which may have no weights.

    A layer has one rank and one scaling for all its slices: the highest rank, smaller ones being
    filled up with zeros, and the largest scaling; where others differ from it (``alpha_pattern``,
    ``rank_pattern``), B takes the difference.

    Args:
        parts: A ``[r_i, K]`` and B ``[N_i, r_i]`` of each slice, at least one; stacks of them for
            experts.
        sizes: N_i.

    Returns:
        A ``[S * r, K]`` with slice i in rows ``i * r`` and following, and B ``[sum N_i, r]``, or
        stacks of them.
    """
    given = [part for part in parts if part is not None]
    if len(parts) == 1:
        return given[0]
    rank = max(part.rank for part in given)
    scaling = max((part.scaling for part in given), key=abs)
    first = given[0]
    experts_a = max((part.lora_a.shape[:-2] for part in given), key=math.prod)
    experts_b = max((part.lora_b.shape[:-2] for part in given), key=math.prod)
    in_features = first.lora_a.shape[-1]
    lora_a = first.lora_a.new_zeros((*experts_a, len(parts), rank, in_features))
    lora_b = first.lora_b.new_zeros((*experts_b, sum(sizes), rank))
    rows_of_b = torch.split(lora_b, list(sizes), dim=-2)
    for i, (part, rows) in enumerate(zip(parts, rows_of_b, strict=True)):
        if part is None:
            continue
        lora_a[..., i, : part.rank, :] = part.lora_a
        same = part.scaling == scaling
        rows[..., : part.rank] = part.lora_b if same else part.lora_b * (part.scaling / scaling)
    return LoRAWeights(lora_a.flatten(-3, -2), lora_b, rank, scaling)


def _checked(where: str, target: LoRASlice, weights: LoRAWeights, max_rank: int) -> LoRAWeights:
    """Return the weights in the form of their layer, which they fit."""
    layer = target.layer
    if weights.is_embedding != isinstance(layer, LoRAEmbedding):
        kind = "an embedding" if weights.is_embedding else "a linear layer"
        raise AdapterError(f"{where}: its weights are for {kind}, the model's is another kind")
    if weights.rank > max_rank:
        raise AdapterError(f"{where}: its rank is {weights.rank}, max_rank is {max_rank}")
    try:
        weights = layer.expand(weights)
        layer.check_sizes(weights.lora_a, weights.lora_b, target.index)
    except ValueError as error:
        raise AdapterError(f"{where}: {error}") from None
    if layer.lora_a.dtype == torch.float16:
        for side, tensor in (("A", weights.lora_a), ("B", weights.lora_b)):
            if not bool(torch.isfinite(tensor.to(torch.float16)).all()):
                raise AdapterError(f"{where}: {side} has values too large for the model's float16")
    return weights


def _of_slices(target: LoRASlice, weights: LoRAWeights) -> list[tuple[int, LoRAWeights]]:
    """Return what each slice gets: all of it, or of an adapter of a whole stack the same A each."""
    if target.index is not None:
        return [(target.index, weights)]
    rows = target.layer.split_rows(weights.lora_b)
    return [(i, weights._replace(lora_b=lora_b)) for i, lora_b in enumerate(rows)]


def _place(layer: LoRAModule, parts: Sequence[LoRAWeights | None]) -> PlacedWeights:
    whole = stack(parts, [shard.full for shard in layer.outputs])
    like = layer.lora_a
    lora_a, lora_b = (
        tensor.detach().to(like.device, like.dtype)
        for tensor in layer.shard(whole.lora_a, whole.lora_b)
    )
    return PlacedWeights(layer, lora_a, lora_b, whole.rank, whole.scaling)


def _check_base_weight(
    source: str, name: str, target: LoRASlice | None, tensor: Tensor
) -> PlacedRows | None:
    """Check a weight that PEFT would put in place of the model's: fine where they are equal.

    Behind those of an embedding that holds added tokens there may be theirs, which are returned.
    """
    layer = target.layer if target is not None and target.index is None else None
    known, added = tensor, None
    if isinstance(layer, LoRAVocabParallelEmbedding) and tensor.dim() == 2:
        known, rows = tensor[: layer.vocab_size], tensor[layer.vocab_size :]
        if 0 < len(rows) <= layer.num_added_tokens:
            like = layer.lora_a
            added = PlacedRows(layer, rows.detach().to(like.device, like.dtype))
        elif len(rows):
            layer = None
    if layer is None or not layer.has_base_weight(known):
        raise AdapterError(
            f"{source}: it brings its own base weight {list(tensor.shape)} for {name!r}, which is "
            "not the model's (an embedding that was resized or trained?)"
        )
    return added
