"""What every subcommand shares."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import warnings
from typing import Any, Protocol

EXIT_OK = 0
EXIT_FAILED = 1  # the work was done and its outcome is bad
EXIT_USAGE = 2  # nothing was done: an argument or an input is wrong
EXIT_INTERRUPTED = 130

# What to install for a module that lora_ext itself does not require.
PIP_NAMES = {
    "transformers": "transformers",
    "peft": "peft",
    "tokenizers": "tokenizers",
    "tqdm": "tqdm",
}


class CommandError(Exception):
    """An input that is wrong, found before any work: printed without a traceback, exit status 2."""


class Command(Protocol):
    """The attributes of a subcommand's module."""

    SUMMARY: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


def require(*modules: str) -> None:
    """Check that lora_ext's library loads and that all ``modules`` can be imported.

    Raises:
        CommandError: they cannot; it says why, or what to install.
    """
    try:
        importlib.import_module("lora_ext._library")
    except ImportError as error:
        raise CommandError(f"{error}\nlora-ext collect-env says more") from error
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        packages = " ".join(PIP_NAMES.get(name, name) for name in missing)
        raise CommandError(f"this command needs {', '.join(missing)}: pip install {packages}")


def quiet_transformers() -> None:
    """Keep the advice and progress bars of transformers and PEFT out of a command's output."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    # PEFT asks transformers for attributes that are on their way out.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # It says so when it saves the embedding beside an adapter of it.
    warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def positive_int(text: str) -> int:
    """Parse a command-line integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return value


def resolve_device(name: str | None) -> str:
    """Return ``name``, or the GPU where there is one, checked to be of use.

    Raises:
        CommandError: the device is not one that torch and lora_ext can use here.
    """
    import torch

    from .._build_info import CUDA_VERSION

    if name is None:
        return "cuda" if CUDA_VERSION and torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CommandError(f"--device {name}: {error}") from error
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device {name}: expected cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise CommandError(f"--device {name}: torch {torch.__version__} sees {count} GPUs here")
        if not CUDA_VERSION:
            raise CommandError(f"--device {name}: lora_ext was built for the CPU only")
    return name
