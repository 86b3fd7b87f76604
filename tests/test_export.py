"""torch.export and AOTInductor take models with the operators in them, and what they make runs."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.cpp_extension import CUDA_HOME

from generators import on_devices
from lora_ext import LoRABatch
from test_compile import BATCHES, MAX_TOKENS, NUM_SLOTS, Decoder, assert_agree, step


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def adapters_of(model: Decoder) -> dict[str, list[Tensor]]:
    """The adapters in plain containers, which a saved program can name."""
    return {name: list(adapters) for name, adapters in model.adapters.items()}


def exported(device: str) -> tuple[Decoder, LoRABatch, Any]:
    """A model, a batch, and the model's program for any number of tokens.

    What changes later is an input: buffers would become constants.
    """
    model, batch = Decoder(device), LoRABatch(MAX_TOKENS, NUM_SLOTS, device)
    arguments = (*step(batch, BATCHES[0]), adapters_of(model))
    dynamic: Any = tree_map(lambda _: None, arguments)
    tokens = torch.export.Dim("tokens", min=1, max=MAX_TOKENS)
    program = torch.export.export(model, arguments, dynamic_shapes=({1: tokens}, None, dynamic[2]))
    return model, batch, program


def assert_serves_every_batch(call: Any, model: Decoder, batch: LoRABatch) -> None:
    """Also with other adapters in the slots."""
    for _ in range(2):
        for slots in (*BATCHES, [2], [1]):
            ids, plan = step(batch, slots)
            assert_agree(call(ids, plan, adapters_of(model)), model(ids, plan))
        model.reload()


@on_devices
def test_an_exported_program_serves_every_batch(device: str) -> None:
    model, batch, program = exported(device)
    assert_serves_every_batch(program.module(), model, batch)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert_serves_every_batch(torch.export.load(file).module(), model, batch)


@on_devices
def test_an_exported_program_decomposes(device: str) -> None:
    """In its core form nothing is written in place, and the operators are still there."""
    model, batch, program = exported(device)
    program = program.run_decompositions()
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "lora_ext.lora_linear.default" in called
    assert any("auto_functionalized" in name for name in called)
    assert_serves_every_batch(program.module(), model, batch)


@on_devices
def test_a_package_of_aot_inductor_serves_every_batch(device: str, tmp_path: Path) -> None:
    if device == "cuda" and CUDA_HOME is None:
        pytest.skip("AOTInductor compiles against the CUDA toolkit, which is not here")
    model, batch, program = exported(device)
    path = torch._inductor.aoti_compile_and_package(
        program,
        package_path=os.fspath(tmp_path / "model.pt2"),
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
    )
    package = torch._inductor.aoti_load_package(path)
    assert_serves_every_batch(package, model, batch)
