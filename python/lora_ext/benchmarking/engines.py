"""The LoRA kernels of inference engines, where one is installed.

Their Python interfaces are not stable; a version that differs is reported as not supported with the
error it gave. Written against vLLM 0.33 and SGLang 0.5.23.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .case import Unsupported
from .providers import DenseProvider, unpack_a
from .registry import Site
from .workload import Workload


class Vllm(DenseProvider):
    """vLLM's Triton kernels behind its punica wrapper: one A and one B tensor per slice."""

    name = "vllm"

    def __init__(
        self, site: Site, workload: Workload, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(site, workload, device, dtype)
        kernels = _engine_module("vllm", "vllm.lora.ops.triton_ops", device)
        try:
            self.lora_shrink, self.lora_expand = kernels.lora_shrink, kernels.lora_expand
            slots = torch.tensor(workload.token_slots, dtype=torch.long, device=device)
            meta = kernels.LoRAKernelMeta.make(workload.num_slots, workload.num_tokens, device)
            meta.prepare_tensors(slots)
            self.meta = meta.meta_args(workload.num_tokens, False)
            # Its tables of weights are keyed by address and never dropped; addresses return.
            tables = importlib.import_module(f"{kernels.__name__}.utils")
            tables._LORA_A_PTR_DICT.clear()
            tables._LORA_B_PTR_DICT.clear()
        except (AttributeError, TypeError) as error:
            raise Unsupported(f"this vLLM differs from 0.33: {error}") from error

    def load(self, lora_a: Tensor, lora_b: Tensor) -> Any:
        # As vLLM stores them: scaling in B, zeros behind each rank.
        workload, rank = self.workload, self.workload.max_rank
        spaced = unpack_a(lora_a, self.site, workload)
        scalings = torch.tensor(workload.scalings, dtype=lora_b.dtype, device=lora_b.device)
        scaled = lora_b * scalings[:, None, None]
        slices = range(self.site.num_slices)
        return (
            [spaced[:, None, i * rank : (i + 1) * rank].contiguous() for i in slices],
            [scaled[:, None, columns].contiguous() for columns in self.site.columns],
        )

    def shrink(self, x: Tensor, weights: Any) -> Tensor:
        xa = torch.empty(
            (self.site.num_slices, self.workload.num_tokens, self.workload.max_rank),
            dtype=torch.float32,
            device=self.device,
        )
        self.lora_shrink(x, weights[0], xa, *self.meta, 1.0)
        return xa

    def expand(self, y: Tensor, xa: Any, weights: Any) -> None:
        self.lora_expand(xa, weights[1], y, *self.meta, offset_start=0, add_inputs=True)


class Sglang(DenseProvider):
    """SGLang's triton_v2 backend: its runner, with the plan its own tables pick."""

    name = "sglang"

    def __init__(
        self, site: Site, workload: Workload, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(site, workload, device, dtype)
        if workload.decode != (workload.num_tokens == len(workload.segments)):
            raise Unsupported("a batch of neither single tokens nor segments")
        backends = _engine_module("sglang", "sglang.srt.lora.backend.triton_v2_backend", device)
        runners = _engine_module("sglang", "sglang.srt.lora.dense.runner", device)
        plans = _engine_module("sglang", "sglang.srt.lora.dense.plan", device)
        try:
            self._prepare(backends, runners, plans)
        except (AttributeError, TypeError) as error:
            raise Unsupported(f"this SGLang differs from 0.5.23: {error}") from error

    def _prepare(self, backends: Any, runners: Any, plans: Any) -> None:
        site, workload = self.site, self.workload
        # A request without an adapter uses a slot of rank 0, one past the pool's.
        spare = -1 in workload.token_slots
        slots = [slot if slot >= 0 else workload.num_slots for _, slot in workload.segments]
        num_slots = workload.num_slots + spare
        backend = backends.TritonV2LoRABackend(num_slots, self.device)
        if torch.cuda.get_device_capability(self.device)[0] == 9:
            backend.runner = runners.DenseLoraRunner(
                backend.lora_workspace,
                max_loras=num_slots,
                device=self.device,
                architecture="sm90",
            )
        if workload.decode:
            backend.init_decode_cuda_graph_batch_info(workload.num_tokens, 1)
        backend.prepare_lora_batch(
            _sglang_batch([length for length, _ in workload.segments], workload.decode, self.int32),
            slots,
            [*workload.ranks, *[0] * spare],
            [*workload.scalings, *[1.0] * spare],
            workload.decode,
        )
        self.runner = backend.runner
        self.plan = self.runner.plan_for(
            plans.DenseLoraKind.LINEAR,
            workload.max_rank,
            site.in_features,
            site.out_features,
            num_tokens=workload.num_tokens,
        )
        self.offsets = (0, *(columns.stop for columns in site.columns))

    def shrink(self, x: Tensor, weights: Any) -> Any:
        return self.runner.run_a(x, weights[0], stack=self.site.num_slices, plan=self.plan)

    def expand(self, y: Tensor, xa: Any, weights: Any) -> None:
        self.runner.run_b(xa, weights[1], y, offsets=self.offsets, plan=self.plan)


ENGINE_PROVIDERS: tuple[type[DenseProvider], ...] = (Sglang, Vllm)


def _engine_module(package: str, module: str, device: torch.device) -> Any:
    if importlib.util.find_spec(package) is None:
        raise Unsupported("not installed")
    if device.type != "cuda":
        raise Unsupported("needs a GPU")
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise Unsupported(f"does not import: {error}") from error


def _sglang_batch(lens: list[int], decode: bool, int32: Any) -> SimpleNamespace:
    """What SGLang's backends read off a ForwardBatch."""
    modes = {
        "is_decode": decode,
        "is_extend": not decode,
        "is_extend_without_speculative": not decode,
        "is_idle": False,
        "is_target_verify": False,
        "is_draft_extend_v2": False,
    }
    return SimpleNamespace(
        batch_size=len(lens),
        forward_mode=SimpleNamespace(
            **{name: (lambda value=value: value) for name, value in modes.items()}
        ),
        spec_info=None,
        return_logprob=False,
        extend_seq_lens_cpu=lens,
        extend_seq_lens=int32(lens),
        extend_num_tokens=sum(lens),
    )
