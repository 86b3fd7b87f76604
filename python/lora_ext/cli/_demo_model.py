"""The demo's model and adapters: made and trained here, offline, and saved as users save them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from .. import demo_data

VOCABULARY = 512
PAD, END = "<pad>", "<end>"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread.

    On a model this small, waiting for a second thread that shares its core with another program
    costs more (five times the training time, measured) than the thread ever saves.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter to train: its text, and the fields of its LoraConfig."""

    name: str
    text: str
    rank: int
    alpha: int
    targets: str | list[str]
    rslora: bool = False
    parameters: tuple[str, ...] = ()  # 3-D weights of experts, adapted by their names

    @property
    def detail(self) -> str:
        targets = [self.targets] if isinstance(self.targets, str) else self.targets
        names = ",".join([*targets, *(["experts"] if self.parameters else [])])
        kind = "rsLoRA" if self.rslora else "LoRA"
        return f"{kind} r={self.rank} on {names}".replace("_proj", "")

    def config(self) -> LoraConfig:
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=self.targets,
            target_parameters=list(self.parameters) or None,
            use_rslora=self.rslora,
        )


# Together they reach every kind of layer: attention, MLP, the input embedding and the output head.
_ADAPTERS = (
    AdapterSpec("recipes", demo_data.RECIPES, 8, 16, ["q_proj", "v_proj", "up_proj", "down_proj"]),
    AdapterSpec("sea_log", demo_data.SEA_LOG, 16, 16, "all-linear", rslora=True),
    AdapterSpec(
        "night_sky",
        demo_data.NIGHT_SKY,
        4,
        8,
        ["q_proj", "k_proj", "v_proj", "o_proj", "embed_tokens", "lm_head"],
    ),
)


# Attention, experts, the input embedding and the output head. PEFT wants all adapters of experts
# to have the same parameters.
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_MOE_ADAPTERS = (
    AdapterSpec("recipes", demo_data.RECIPES, 8, 16, ["q_proj", "v_proj"], parameters=_EXPERTS),
    AdapterSpec(
        "sea_log",
        demo_data.SEA_LOG,
        16,
        16,
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        rslora=True,
        parameters=_EXPERTS,
    ),
    _ADAPTERS[2],
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of ``VOCABULARY`` tokens on the shipped texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([demo_data.BASE, *(spec.text for spec in _ADAPTERS)], trainer)
    make: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = make(
        tokenizer_object=bpe, pad_token=PAD, eos_token=END, padding_side="left"
    )
    return tokenizer


def _common_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }


def _make_llama(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_common_config(tokenizer)))


def _make_qwen3_moe(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **_common_config(tokenizer),
            moe_intermediate_size=96,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
        )
    )


@dataclass(frozen=True)
class DemoModel:
    """A model to train, with random weights from torch's seed, and its adapters."""

    family: str
    make: Callable[[PreTrainedTokenizerFast], PreTrainedModel]
    adapters: tuple[AdapterSpec, ...]

    @property
    def ranks(self) -> dict[str, int]:
        return {spec.name: spec.rank for spec in self.adapters}


DENSE = DemoModel("Llama", _make_llama, _ADAPTERS)
MOE = DemoModel("Qwen3-MoE", _make_qwen3_moe, _MOE_ADAPTERS)


@one_thread()
def train(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    *,
    steps: int,
    learning_rate: float,
) -> float:
    """Train what requires grad, every step on all paragraphs of ``text``; returns the last loss."""
    paragraphs = [paragraph + END for paragraph in demo_data.paragraphs(text)]
    batch = tokenizer(paragraphs, return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    loss = torch.zeros(())
    model.train()
    for _ in range(steps):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    return float(loss.detach())


def train_base(
    kind: DemoModel, directory: Path, *, seed: int, steps: int
) -> tuple[PreTrainedModel, Any, float]:
    """Make and train the base model, and save it with its tokenizer in ``directory``."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = kind.make(tokenizer)
    loss = train(model, tokenizer, demo_data.BASE, steps=steps, learning_rate=3e-3)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model, tokenizer, loss


def add_adapter(
    model: PreTrainedModel | PeftModel, tokenizer: Any, spec: AdapterSpec, *, steps: int
) -> tuple[PeftModel, float]:
    """Train one more adapter with PEFT; those that ``model`` has already stay as they are."""
    if isinstance(model, PeftModel):
        model.add_adapter(spec.name, spec.config())
        model.set_adapter(spec.name)
    else:
        model = get_peft_model(model, spec.config(), adapter_name=spec.name)
    return model, train(model, tokenizer, spec.text, steps=steps, learning_rate=1e-2)


def save_adapters(model: PeftModel, directory: Path) -> None:
    """Save every adapter with PEFT, each in a folder of its name."""
    model.save_pretrained(str(directory))
