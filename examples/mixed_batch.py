"""A Hugging Face model in one call: every prompt of a batch with its own adapter, or none.

    python examples/mixed_batch.py

The model is a small Llama with random weights, so that the example needs no download; its adapters
are made and saved by PEFT. What they compute is compared with PEFT at the end.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lora_ext

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
ADAPTERS = {
    "summarize": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    "translate": LoraConfig(
        r=16, target_modules="all-linear", use_rslora=True, init_lora_weights=False
    ),
}


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


def save_adapters(directory: Path) -> PeftModel:
    """Save every adapter in a folder of its name, and return PEFT's model of them."""
    model = None
    for name, config in ADAPTERS.items():
        if model is None:
            model = get_peft_model(make_model(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    model.save_pretrained(str(directory))
    return model.eval()


@torch.no_grad()
def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        peft_model = save_adapters(Path(directory))
        model = lora_ext.wrap(make_model(), max_adapters=8, max_rank=16)
        for name in ADAPTERS:
            model.load_adapter(name, Path(directory) / name)

    # Four prompts of equal length; prompts of several lengths are padded on the left, as usual.
    prompts = torch.randint(1, CONFIG.vocab_size, (4, 6))
    adapters = ["translate", None, "summarize", "translate"]
    output = model.generate(prompts, adapters=adapters, max_new_tokens=8, do_sample=False)
    for adapter, row in zip(adapters, output[:, prompts.shape[1] :].tolist(), strict=True):
        print(f"{adapter or '(no adapter)':12} {row}")

    # The logits of all rows, beside those of PEFT with one adapter at a time.
    logits = model(output, adapters=adapters).logits
    for index, adapter in enumerate(adapters):
        row = output[index : index + 1]
        if adapter is None:
            with peft_model.disable_adapter():
                expected = peft_model(row).logits[0]
        else:
            peft_model.set_adapter(adapter)
            expected = peft_model(row).logits[0]
        torch.testing.assert_close(logits[index], expected, rtol=1e-4, atol=1e-4)
    print("every row equals PEFT running its adapter alone")

    # Adapters come and go while the others stay.
    model.remove_adapter("summarize")
    print("loaded:", ", ".join(model.adapters))


if __name__ == "__main__":
    main()
