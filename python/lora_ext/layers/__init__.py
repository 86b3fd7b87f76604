"""Layers that add each token's adapter to what their base module computes."""

from .base import LoRAModule, LoRASlice
from .embedding import LoRAEmbedding
from .expert_parallel import ExpertParallel
from .experts import ExpertLinear, LoRAExperts
from .fused_moe import FusedMoE
from .linear import LoRALinear
from .lm_head import LoRALMHead
from .parallel_linear import (
    LoRAColumnParallelLinear,
    LoRAQKVParallelLinear,
    LoRARowParallelLinear,
)
from .router import LoRAGate, LoRARouter
from .routing import Routing, RowPlans
from .vocab_parallel import LoRAVocabParallelEmbedding

# What engines call a column-parallel layer of several slices, and a layer that no rank cuts.
LoRAMergedColumnParallelLinear = LoRAColumnParallelLinear
LoRAReplicatedLinear = LoRALinear

__all__ = [
    "ExpertLinear",
    "ExpertParallel",
    "FusedMoE",
    "LoRAColumnParallelLinear",
    "LoRAEmbedding",
    "LoRAExperts",
    "LoRAGate",
    "LoRALMHead",
    "LoRALinear",
    "LoRAMergedColumnParallelLinear",
    "LoRAModule",
    "LoRAQKVParallelLinear",
    "LoRAReplicatedLinear",
    "LoRARouter",
    "LoRARowParallelLinear",
    "LoRASlice",
    "LoRAVocabParallelEmbedding",
    "Routing",
    "RowPlans",
]
