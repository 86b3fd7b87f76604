"""Layers that add each token's adapter to what their base module computes."""

from .base import LoRAModule
from .embedding import LoRAEmbedding
from .linear import LoRALinear, LoRALMHead
from .routing import Routing, RowPlans

__all__ = ["LoRAEmbedding", "LoRALMHead", "LoRALinear", "LoRAModule", "Routing", "RowPlans"]
