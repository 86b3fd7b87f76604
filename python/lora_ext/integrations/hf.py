"""wrap: puts lora_ext's layers into a Hugging Face causal LM: an adapter per row of a batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..adapters import Adapter, load_adapter
from ..batch import LoRABatch
from ..layers import (
    FusedMoE,
    LoRAEmbedding,
    LoRAGate,
    LoRALinear,
    LoRALMHead,
    LoRAModule,
    LoRARouter,
    LoRASlice,
    Routing,
    RowPlans,
)
from ..layers.fused_moe import is_experts
from ..layers.router import is_router
from ..pool import AdapterInfo, AdapterPool
from . import module_lists

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoRAModel:
    """A causal LM whose batches have an adapter, or none, per row. Made by :func:`wrap`.

    Attributes:
        model: the Hugging Face model, with lora_ext's layers in it; called on its own it computes
            the base model, and inside ``use`` each row with its adapter.
        pool: the adapters in their slots.
    """

    def __init__(self, model: PreTrainedModel, pool: AdapterPool, routing: Routing) -> None:
        self.model = model
        self.pool = pool
        self._routing = routing

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """The loaded adapters by name."""
        return self.pool.adapters

    def load_adapter(
        self, name: str, adapter: str | os.PathLike[str] | Adapter, *, replace: bool = False
    ) -> None:
        """Load a PEFT directory, or an Adapter, under a name; ``replace`` allows a loaded name.

        A replaced adapter keeps its slot, and its new weights count from the next forward on.

        Raises:
            AdapterError: it is malformed, not supported or not for this model.
            ValueError: the name is taken.
            RuntimeError: all slots are taken.
            In each case all adapters are as they were.
        """
        if not isinstance(adapter, Adapter):
            adapter = load_adapter(adapter)
        self.pool.load(name, adapter, replace=replace)

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter; KeyError where there is none, RuntimeError inside ``use`` of it."""
        self.pool.remove(name)

    @contextmanager
    def use(self, adapters: Sequence[str | None]) -> Iterator[None]:
        """Give each row of the batches inside a ``with`` block its adapter.

        A batch may have a multiple of the rows, as ``generate`` makes it for beams and several
        sequences per prompt: row i then stands for as many consecutive rows. Blocks may nest, and
        count for calls from the thread that entered them.

        Args:
            adapters: name per row; None: the base model.

        Raises:
            KeyError: a name is not loaded.
            ValueError: ``adapters`` is empty or a single string.
        """
        if isinstance(adapters, str) or not adapters:
            raise ValueError(
                f"adapters must be a list with a name or None for each row, got {adapters!r}"
            )
        device = next(self.model.parameters()).device
        with self.pool.using(list(adapters)) as slots:
            plans = RowPlans(slots, self.pool.max_adapters, device)
            with self._routing.using(plans):
                yield

    @contextmanager
    def route(self, batch: LoRABatch) -> Iterator[None]:
        """Route the calls of this thread by a LoRABatch inside a ``with`` block.

        Its tokens are those of the batches, flattened. A static LoRABatch is how a captured graph
        gets to follow other adapters; they must be kept in their slots by ``pool.using``.
        """
        with self._routing.using(batch):
            yield

    def __call__(
        self,
        input_ids: Tensor | None = None,
        *,
        adapters: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the model: input_ids ``[rows, tokens]``, other arguments as its forward has them.

        Args:
            adapters: name or None for each row; left out, an enclosing ``use`` counts, else the
                base model.

        Raises:
            ValueError, KeyError: as ``use``, or one entry per row is not what was given.
        """
        if adapters is None:
            return self.model(input_ids, **kwargs)
        _check_rows(adapters, input_ids, kwargs)
        with self.use(adapters):
            return self.model(input_ids, **kwargs)

    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        adapters: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the model's ``generate``: prompts ``[rows, tokens]`` and its own arguments.

        Args:
            adapters: as in ``__call__``.

        Raises:
            ValueError, KeyError: as ``__call__``.
        """
        generate: Any = self.model.generate
        if adapters is None:
            return generate(input_ids, **kwargs)
        _check_rows(adapters, input_ids, kwargs)
        with self.use(adapters):
            return generate(input_ids, **kwargs)


def wrap(
    model: PreTrainedModel,
    *,
    max_adapters: int,
    max_rank: int,
    target_modules: Sequence[str] | None = None,
    shared_outer_experts: bool = False,
    evict_lru: bool = False,
) -> LoRAModel:
    """Put lora_ext's layers into a Hugging Face causal LM (Llama, Qwen, Mistral, MoE or not).

    The model is changed in place and its parameters are shared. Each layer holds ``max_adapters``
    slots of rank ``max_rank`` in the dtype and on the device of its weight: move the model first,
    and save it, if at all, before: the names of its parameters change.

    Args:
        model: on one device.
        max_adapters: adapters that can be loaded at a time.
        max_rank: the highest rank of an adapter's module, up to 1024.
        target_modules: layers that can be adapted, by their names or the last parts of them; None:
            all linear layers, experts and routers of MoE layers, the input embedding and the output
            projection.
        shared_outer_experts: all experts of a layer share A of gate and up, and B of down, as in
            adapters that are trained so: saves their memory, and refuses other adapters.
        evict_lru: a new adapter may take the place of the one unused for longest.

    Raises:
        ValueError: the model is wrapped already, is PEFT's, spans devices, or has no such layer.
    """
    require_plain(model)
    routing = Routing()
    selected = _select(model, target_modules)
    layers: dict[nn.Module, LoRAModule | FusedMoE] = {}
    targets: dict[str, LoRAModule | LoRASlice] = {}
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    for name, module in selected.items():
        if module not in layers:
            layers[module] = _layer(
                name,
                module,
                max_adapters,
                max_rank,
                routing,
                is_head=module is head,
                is_gate=name.endswith(".gate")
                and f"{name.removesuffix('gate')}experts" in selected,
                shared_outer=shared_outer_experts,
            )
        targets |= _targets(name, layers[module])
    pool = AdapterPool(targets, evict_lru=evict_lru)
    for name, module in selected.items():
        _put(model, name, layers[module])
    return LoRAModel(model, pool, routing)


def require_plain(model: PreTrainedModel) -> None:
    """Raise ValueError unless the model is on one device and has no adapters in it yet."""
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("the model has PEFT adapters in it: wrap the base model instead")
    if any(isinstance(module, LoRAModule) for module in model.modules()):
        raise ValueError("the model is wrapped already")
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) != 1 or "meta" in devices:
        raise ValueError(f"the model must be on one device, its parameters are on {devices}")


def _put(model: PreTrainedModel, name: str, layer: LoRAModule | FusedMoE) -> None:
    """Put a layer in the place of the module of this name."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if isinstance(layer, FusedMoE) and module_lists.is_block(parent):
        grandparent, _, child = parent_name.rpartition(".")
        setattr(model.get_submodule(grandparent), child, module_lists.SparseMoeBlock(parent, layer))
    else:
        setattr(parent, child, layer)


def _targets(name: str, layer: LoRAModule | FusedMoE) -> dict[str, LoRAModule | LoRASlice]:
    """Return what adapters of the layer go into, by the names that they have in adapters."""
    parts = {"": layer} if isinstance(layer, LoRAModule) else layer.targets
    names = [name]
    if isinstance(layer, (FusedMoE, LoRARouter)):
        # Mixtral's adapters may be older than the name that its layers have now.
        names.append(name.replace(".mlp.", ".block_sparse_moe."))
    return {
        f"{known}.{part}".rstrip("."): target for known in names for part, target in parts.items()
    }


def _select(model: PreTrainedModel, targets: Sequence[str] | None) -> dict[str, nn.Module]:
    """Return the layers to adapt by name."""
    kinds = (nn.Linear, nn.Embedding)
    modules = dict(model.named_modules(remove_duplicate=False))
    lists = [name for name, module in modules.items() if module_lists.is_list(module)]
    adaptable = {
        name: module
        for name, module in modules.items()
        if isinstance(module, kinds) or is_experts(module) or is_router(module)
        # An expert in a list sees some tokens alone: it is adapted with the others, or not at all.
        if not any(name.startswith(f"{experts}.") for experts in lists)
    }
    adaptable |= {name: modules[name] for name in lists if module_lists.is_fusable(model, name)}
    if targets is None:
        embedding = model.get_input_embeddings()
        selected: dict[str, nn.Module] = {
            name: module
            for name, module in adaptable.items()
            if not isinstance(module, nn.Embedding) or module is embedding
        }
    else:
        if isinstance(targets, str):
            raise ValueError(f"target_modules must be a list of names, got {targets!r}")
        selected = {}
        for target in targets:
            found = {
                name: module
                for name, module in adaptable.items()
                if name == target or name.endswith(f".{target}")
            }
            if not found:
                raise ValueError(f"target_modules has {target!r}, which names no layer to adapt")
            selected.update(found)
    if not selected:
        raise ValueError("the model has no linear layer to adapt")
    return selected


def _layer(
    name: str,
    module: nn.Module,
    max_adapters: int,
    max_rank: int,
    routing: Routing,
    *,
    is_head: bool,
    is_gate: bool,
    shared_outer: bool,
) -> LoRAModule | FusedMoE:
    limits = (max_adapters, max_rank, routing)
    try:
        if isinstance(module, nn.Embedding):
            if type(module) is not nn.Embedding:
                raise ValueError(f"{type(module).__name__} is not a plain embedding")
            return LoRAEmbedding(module, *limits)
        if isinstance(module, nn.Linear):
            kind = LoRALMHead if is_head else LoRAGate if is_gate else LoRALinear
            return kind(module, *limits)
        if is_router(module):
            return LoRARouter(module, *limits)
        if isinstance(module, nn.ModuleList):
            return module_lists.fuse_list(module, *limits, shared_outer=shared_outer)
        return FusedMoE.from_experts(module, *limits, shared_outer=shared_outer)
    except ValueError as error:
        raise ValueError(f"layer {name!r} cannot take adapters: {error}") from error


def _check_rows(
    adapters: Sequence[str | None], input_ids: Tensor | None, kwargs: dict[str, Any]
) -> None:
    """Raise where the batch has another number of rows than ``adapters`` has entries."""
    batch = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
    if batch is None:
        batch = kwargs.get("inputs")
    if isinstance(batch, Tensor) and not isinstance(adapters, str) and len(adapters) != len(batch):
        raise ValueError(f"the batch has {len(batch)} rows, adapters has {len(adapters)} entries")
