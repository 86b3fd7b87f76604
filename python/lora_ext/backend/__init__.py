"""The surface of an inference engine's LoRA backend: SGLang's methods over lora_ext's operators."""

from .batch_info import LoRABatchInfo, MoELoRABatchInfo
from .forward import ForwardBatch, ForwardMode, SpecInfo
from .lora_backend import LoRABackend

__all__ = [
    "ForwardBatch",
    "ForwardMode",
    "LoRABackend",
    "LoRABatchInfo",
    "MoELoRABatchInfo",
    "SpecInfo",
]
