"""The demo's model and adapters: made and trained here, offline, and saved as users save them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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

    def config(self) -> LoraConfig:
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=self.targets,
            use_rslora=self.rslora,
        )


# Together they reach every kind of layer: attention, MLP, the input embedding and the output head.
ADAPTERS = (
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
    bpe.train_from_iterator([demo_data.BASE, *(spec.text for spec in ADAPTERS)], trainer)
    make: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = make(
        tokenizer_object=bpe, pad_token=PAD, eos_token=END, padding_side="left"
    )
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a small Llama (0.4 million parameters) with random weights from torch's seed."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


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


def train_base(directory: Path, *, seed: int, steps: int) -> tuple[LlamaForCausalLM, Any, float]:
    """Make and train the base model, and save it with its tokenizer in ``directory``."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    loss = train(model, tokenizer, demo_data.BASE, steps=steps, learning_rate=3e-3)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model, tokenizer, loss


def add_adapter(
    model: LlamaForCausalLM | PeftModel, tokenizer: Any, spec: AdapterSpec, *, steps: int
) -> tuple[PeftModel, float]:
    """Train one more adapter with PEFT; those that ``model`` has already stay as they are."""
    if isinstance(model, PeftModel):
        model.add_adapter(spec.name, spec.config())
        model.set_adapter(spec.name)
    else:
        model = get_peft_model(model, spec.config(), adapter_name=spec.name)
    return model, train(model, tokenizer, spec.text, steps=steps, learning_rate=1e-2)


def save_adapters(model: PeftModel, directory: Path) -> dict[str, Path]:
    """Save every adapter with PEFT; returns the directory of each."""
    model.save_pretrained(str(directory))
    return {spec.name: directory / spec.name for spec in ADAPTERS}
