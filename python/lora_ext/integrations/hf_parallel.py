"""parallelize: a Hugging Face causal LM, cut among the ranks of a tensor-parallel group."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..layers import (
    LoRAColumnParallelLinear,
    LoRALMHead,
    LoRAModule,
    LoRARowParallelLinear,
    LoRAVocabParallelEmbedding,
    Routing,
)
from ..layers.parallel_linear import head_shards
from ..layers.sharding import TensorParallel
from ..pool import AdapterPool
from .hf import LoRAModel, require_plain

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedModel

_COLUMN_PARALLEL = ("q_proj", "gate_proj", "up_proj")
_OF_KV_HEADS = ("k_proj", "v_proj")
_ROW_PARALLEL = ("o_proj", "down_proj")


def parallelize(
    model: PreTrainedModel,
    group: ProcessGroup,
    *,
    max_adapters: int,
    max_rank: int,
    evict_lru: bool = False,
    logits_dtype: torch.dtype | None = None,
) -> LoRAModel:
    """Cut a causal LM (Llama, Qwen and Mistral families) among the ranks of a group.

    Every rank has the whole model first, and keeps its part: its attention heads, its features of
    the MLPs, its rows of the vocabulary. All of them take adapters. From then on every rank does
    the same: it loads the same adapters in the same order and calls the model with the same batch,
    and gets the whole logits. Random sampling needs the same seed on every rank.

    The model is changed in place, and it may be moved to this rank's device afterwards. It gets a
    config of its own with this rank's numbers of heads, by which caches are made. It cannot be
    saved.

    Args:
        model: on one device; the same weights on every rank.
        group: the ranks; ``torch.distributed.group.WORLD`` for all processes.
        max_adapters: adapters that can be loaded at a time.
        max_rank: the highest rank of an adapter's module, up to 1024.
        evict_lru: a new adapter may take the place of the one unused for longest.
        logits_dtype: of the logits, as in ``LoRALMHead``; None: that of the weights.

    Raises:
        ValueError: as ``wrap``; heads or features do not divide among the ranks; or the model has a
            layer of which it is not known how to cut it. The model is as it was.
    """
    require_plain(model)
    config: Any = model.config
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads or heads
    size = TensorParallel(group).size
    q_shards, kv_shards, _ = head_shards(size, heads, kv_heads)

    routing = Routing()
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    embedding = model.get_input_embeddings()

    def cut(name: str, module: nn.Module) -> LoRAModule | None:
        last = name.rpartition(".")[2]
        common = (module, max_adapters, max_rank, routing)
        if module is head:
            return LoRALMHead.from_full(*common, group=group, logits_dtype=logits_dtype)
        if module is embedding:
            return LoRAVocabParallelEmbedding.from_full(*common, group=group)
        if last in _COLUMN_PARALLEL:
            return LoRAColumnParallelLinear.from_full(*common, group=group)
        if last in _OF_KV_HEADS:
            return LoRAColumnParallelLinear.from_full(*common, group=group, num_shards=[kv_shards])
        if last in _ROW_PARALLEL:
            return LoRARowParallelLinear.from_full(*common, group=group)
        if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
            raise ValueError("it is not known how to cut a layer of this name")
        return None

    layers: dict[str, LoRAModule] = {}
    for name, module in model.named_modules():
        try:
            layer = cut(name, module)
        except ValueError as error:
            raise ValueError(f"layer {name!r} cannot be cut among {size} ranks: {error}") from error
        if layer is not None:
            layers[name] = layer
    pool = AdapterPool(layers, evict_lru=evict_lru)

    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    _set_heads(model, heads // q_shards, kv_heads // kv_shards)
    return LoRAModel(model, pool, routing)


def _set_heads(model: PreTrainedModel, heads: int, kv_heads: int) -> None:
    """Tell the attention layers and the config, a copy, how many heads this rank has."""
    whole: Any = model.config
    config = copy.deepcopy(whole)
    config.num_attention_heads, config.num_key_value_heads = heads, kv_heads
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = heads // kv_heads
            config.head_dim = module.head_dim  # which may have been derived from the heads
        if getattr(module, "config", None) is whole:
            module.config = config
