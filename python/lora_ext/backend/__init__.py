"""The surface of an inference engine's LoRA backend: SGLang's methods over lora_ext's operators."""

from ..moe import ExpertLoRA, LoRAHooks, MoEBuffers
from .batch_info import LoRABatchInfo, MoELoRABatchInfo
from .engine_hooks import build_lora_hooks
from .forward import ForwardBatch, ForwardMode, SpecInfo
from .lora_backend import LoRABackend

__all__ = [
    "ExpertLoRA",
    "ForwardBatch",
    "ForwardMode",
    "LoRABackend",
    "LoRABatchInfo",
    "LoRAHooks",
    "MoEBuffers",
    "MoELoRABatchInfo",
    "SpecInfo",
    "build_lora_hooks",
]
