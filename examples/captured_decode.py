"""A Hugging Face model that decodes in a CUDA graph while the rows' adapters change.

    python examples/captured_decode.py

The decode step of a wrapped model, with a static cache, is captured once. Between replays rows get
other adapters, and an adapter is replaced in its slot; the tokens must be those of the model called
eagerly. Without a GPU the same step is called instead of replayed. Needs transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import lora_ext
from lora_ext.adapters import Adapter, LoRAWeights
from lora_ext.integrations.static_decoder import StaticDecoder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANKS = {"formal": 4, "brief": 16, "french": 8}
# The adapter of each row, and how many tokens they decode with.
PHASES: list[tuple[list[str | None], int]] = [
    (["formal", None, "brief"], 5),
    ([None, None, None], 3),  # the base model, through the same graph
    (["french", "french", "formal"], 6),
]


def random_adapter(model: LlamaForCausalLM, rank: int, seed: int) -> Adapter:
    """What `lora_ext.load_adapter` would read from a PEFT directory."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "v_proj", "down_proj")):
            a = torch.randn(rank, module.in_features, generator=generator)
            b = torch.randn(module.out_features, rank, generator=generator)
            modules[name] = LoRAWeights(a * 0.1, b, rank, scaling=1.0)
    return Adapter(modules=modules, source=f"random {seed}")


def eagerly(lora: lora_ext.LoRAModel, prompts: Tensor, replacement: Adapter) -> Tensor:
    """The tokens by a plain loop over the model."""
    cache, tokens, new = DynamicCache(), prompts, []
    for adapters, steps in PHASES:
        for _ in range(steps):
            output = lora(tokens, adapters=adapters, past_key_values=cache, use_cache=True)
            tokens = output.logits[:, -1:].argmax(-1)
            new.append(tokens)
        lora.load_adapter("formal", replacement, replace=True)
    return torch.cat(new, dim=1)


def captured(lora: lora_ext.LoRAModel, prompts: Tensor, replacement: Adapter) -> Tensor:
    """The tokens from the captured step."""
    new = []
    with StaticDecoder(lora, rows=len(prompts), max_length=64) as decoder:
        for phase, (adapters, steps) in enumerate(PHASES):
            if phase == 0:
                new.append(decoder.prefill(prompts, adapters=adapters))
            else:
                decoder.route(adapters)
            while len(new) < sum(steps for _, steps in PHASES[: phase + 1]):
                new.append(decoder.step())
            lora.load_adapter("formal", replacement, replace=True)
    return torch.stack(new, dim=1)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(DEVICE).eval()
    adapters = {
        name: random_adapter(model, rank, seed) for seed, (name, rank) in enumerate(RANKS.items())
    }
    replacement = random_adapter(model, rank=2, seed=99)
    lora = lora_ext.wrap(model, max_adapters=3, max_rank=16)
    prompts = torch.randint(0, 200, (3, 7), device=DEVICE)

    results = []
    for decode in (eagerly, captured):
        for name, adapter in adapters.items():
            lora.load_adapter(name, adapter, replace=name in lora.adapters)
        results.append(decode(lora, prompts, replacement))
    assert torch.equal(*results)
    how = "one CUDA graph" if DEVICE == "cuda" else "no GPU here, so the uncaptured step"
    print(f"{how} served {len(PHASES)} mixes of adapters:\n{results[1].tolist()}")


if __name__ == "__main__":
    main()
