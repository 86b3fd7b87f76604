"""lora_ext: multi-LoRA kernels for PyTorch, many adapters in one batch.

``import lora_ext`` registers ``torch.ops.lora_ext.*``; the rest loads when it is first used::

    model = lora_ext.wrap(transformers_model, max_adapters=8, max_rank=64)
    model.load_adapter("sql", "path/to/peft/directory")
    model.generate(input_ids, adapters=["sql", None])
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

# A library that does not load must not keep `lora-ext collect-env` from saying so: the import goes
# on with a warning, and whatever needs the ops raises the same ImportError.
try:
    from . import _autograd as _autograd
    from . import ops
except ImportError as error:
    warnings.warn(f"torch.ops.lora_ext is not available: {error}", RuntimeWarning, stacklevel=2)

if TYPE_CHECKING:
    from . import adapters, backend, compat, layers, ops, reference
    from .adapters import Adapter, AdapterError, load_adapter
    from .backend import LoRABackend
    from .batch import LoRABatch
    from .integrations.hf import LoRAModel, wrap
    from .moe_ops import moe_routing_size
    from .pool import AdapterPool

_MODULES = (
    "adapters",
    "backend",
    "batch",
    "compat",
    "integrations",
    "layers",
    "ops",
    "pool",
    "reference",
)
_EXPORTS = {
    "Adapter": "adapters",
    "AdapterError": "adapters",
    "AdapterPool": "pool",
    "LoRABackend": "backend",
    "LoRABatch": "batch",
    "LoRAModel": "integrations.hf",
    "load_adapter": "adapters",
    "moe_routing_size": "moe_ops",
    "wrap": "integrations.hf",
}

__all__ = [
    "Adapter",
    "AdapterError",
    "AdapterPool",
    "LoRABackend",
    "LoRABatch",
    "LoRAModel",
    "adapters",
    "backend",
    "compat",
    "layers",
    "load_adapter",
    "moe_routing_size",
    "ops",
    "reference",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    elif name in _MODULES:
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_EXPORTS})
