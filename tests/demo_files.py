"""The demo's model and adapters, barely trained, for the tests that need a real model on disk."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ext.cli import demo
from lora_ext.cli._command import quiet_transformers

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTERS = ("night_sky", "recipes", "sea_log")
_keep_until_exit: list[tempfile.TemporaryDirectory[str]] = []


@dataclass(frozen=True)
class DemoFiles:
    """What ``lora-ext demo --keep`` leaves, and the PEFT model it was saved from."""

    directory: Path
    peft_model: PeftModel
    tokenizer: Any
    moe: bool

    @property
    def model(self) -> Path:
        return self.directory / "model"

    def adapter(self, name: str) -> Path:
        return self.directory / "adapters" / name

    @property
    def adapter_options(self) -> list[str]:
        """``--adapter NAME=DIR`` for every adapter."""
        return [part for n in ADAPTERS for part in ("--adapter", f"{n}={self.adapter(n)}")]


@functools.cache
def make_demo_files(moe: bool = False) -> DemoFiles:
    """Train once per test run; the adapters get steps enough to change the text."""
    quiet_transformers()
    temporary = tempfile.TemporaryDirectory(prefix="lora-ext-tests-")
    _keep_until_exit.append(temporary)
    directory = Path(temporary.name) / "demo-out"
    peft_model, tokenizer = demo.prepare(directory, moe=moe, base_steps=30, adapter_steps=30)
    return DemoFiles(directory, peft_model, tokenizer, moe)
