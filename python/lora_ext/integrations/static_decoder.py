"""StaticDecoder: a wrapped model's greedy decoding with a static cache, one CUDA graph a step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..batch import LoRABatch
from .hf import LoRAModel


class StaticDecoder:
    """Decodes a fixed number of rows, each with its adapter, one token of each at a time.

    The step is captured once, and its graph is replayed for every later mix: the batch's plan, the
    adapters in their slots, the cache and the positions are read from where they were at the
    capture, and changed there. A second graph, of the base model, serves while no row has an
    adapter, so that such steps cost nothing more. On a CPU the step is called instead.

    The adapters of the rows stay in their slots until other ones take their place (``route``,
    ``prefill``) or the decoder is closed; it is a context manager that closes itself.

    Args:
        lora: a model that attends to all that went before (no sliding window shorter than
            ``max_length``); moved and loaded, as its weights must keep their addresses.
        rows: of every batch; rows of no use may have no adapter and any prompt.
        max_length: tokens of a row, prompt and padding included.
        capture: False: call the step also on a GPU.

    Raises:
        ValueError: sizes below 1 and 2, or layers whose cache is a window.
    """

    def __init__(
        self, lora: LoRAModel, rows: int, max_length: int, *, capture: bool = True
    ) -> None:
        if rows < 1 or max_length < 2:
            raise ValueError(f"expected rows >= 1 and max_length >= 2, got {rows} and {max_length}")
        self.lora = lora
        self.rows = rows
        self.max_length = max_length
        device = next(lora.model.parameters()).device
        self._length = 0
        self._in_use = ExitStack()
        with torch.inference_mode(False), torch.no_grad():
            self._batch = LoRABatch.for_cuda_graph(rows, lora.pool.max_adapters, device)
            self._cache: Any = _static_cache(lora.model.config, max_length)
            self._ids = torch.zeros((rows, 1), dtype=torch.int64, device=device)
            self._position_ids = torch.zeros_like(self._ids)
            self._cache_position = torch.zeros(1, dtype=torch.int64, device=device)
            self._mask = torch.ones((rows, max_length), dtype=torch.int64, device=device)
            # Until version 5 of transformers the cache is told where its next token goes.
            parameters = inspect.signature(lora.model.forward).parameters
            self._tells_position = "cache_position" in parameters
            with self._routed(False):
                self._run(self._ids, self._position_ids, self._cache_position, self._mask[:, :1])
            self._steps: dict[bool, Callable[[], None]] = {
                with_adapters: partial(self._decode, with_adapters)
                for with_adapters in (True, False)
            }
            if capture and device.type == "cuda":
                for with_adapters, step in self._steps.items():
                    self._reset()
                    self._steps[with_adapters] = _captured(step)

    def __enter__(self) -> StaticDecoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the adapters in use."""
        self._in_use.close()

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        *,
        adapters: Sequence[str | None],
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Start over with prompts ``[rows, tokens]``, padded on the left.

        Args:
            input_ids: int64, on the model's device.
            adapters: name or None for each row.
            attention_mask: ``[rows, tokens]``, 0 for padding; None: there is none.

        Returns:
            The first new token of each row: int64 ``[rows]``.

        Raises:
            KeyError: a name is not loaded.
            ValueError: shapes or numbers that do not fit.
        """
        tokens = input_ids.shape[-1]
        if input_ids.shape != (self.rows, tokens) or not 1 <= tokens <= self.max_length:
            raise ValueError(
                f"input_ids is {list(input_ids.shape)}, expected [{self.rows}, 1 to "
                f"{self.max_length}]"
            )
        self.route(adapters)
        self._reset()
        self._mask.fill_(1)
        if attention_mask is not None:
            self._mask[:, :tokens] = attention_mask
        mask = self._mask[:, :tokens]
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        cache_position = torch.arange(tokens, device=input_ids.device)
        with self.lora.use(adapters):
            logits = self._run(input_ids, position_ids, cache_position, mask)
        self._ids.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self._position_ids.copy_(position_ids[:, -1:] + 1)
        self._cache_position.fill_(tokens)
        self._length = tokens
        return self._ids[:, 0].clone()

    def route(self, adapters: Sequence[str | None]) -> None:
        """Give the rows other adapters, from the next step on; what is in the cache stays as it is.

        Raises:
            KeyError: a name is not loaded.
            ValueError: there is not one for each row.
        """
        if len(adapters) != self.rows:
            raise ValueError(f"got {len(adapters)} adapters for {self.rows} rows")
        with ExitStack() as new:
            slots = new.enter_context(self.lora.pool.using(list(adapters)))
            self._batch.update(slots)
            self._in_use.close()
            self._in_use = new.pop_all()

    @torch.no_grad()
    def step(self) -> Tensor:
        """Take the next token of each row: int64 ``[rows]``, on the device; nothing waits for it.

        Raises:
            ValueError: there was no prefill, or the rows are full.
        """
        if not 0 < self._length < self.max_length:
            raise ValueError(
                f"the rows have {self._length} of {self.max_length} tokens: there is nothing to go "
                "on from, or no room for another"
            )
        self._length += 1
        self._steps[self._batch.has_active_lora]()
        return self._ids[:, 0].clone()

    def generate(
        self,
        input_ids: Tensor,
        *,
        adapters: Sequence[str | None],
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Call ``prefill`` and ``step``: prompts and new tokens ``[rows, tokens + new]``."""
        new = [self.prefill(input_ids, adapters=adapters, attention_mask=attention_mask)]
        new += [self.step() for _ in range(max_new_tokens - 1)]
        return torch.cat([input_ids, torch.stack(new, dim=1)], dim=1)

    def _run(
        self, ids: Tensor, position_ids: Tensor, cache_position: Tensor, mask: Tensor
    ) -> Tensor:
        """Call the model, which fills the cache; returns the logits."""
        told = {"cache_position": cache_position} if self._tells_position else {}
        output: Any = self.lora.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=self._cache,
            use_cache=True,
            **told,
        )
        logits: Tensor = output.logits
        return logits

    def _routed(self, with_adapters: bool) -> AbstractContextManager[None]:
        return self.lora.route(self._batch) if with_adapters else self.lora.use([None] * self.rows)

    def _reset(self) -> None:
        self._cache.reset()
        self._cache_position.zero_()

    def _decode(self, with_adapters: bool) -> None:
        """Go on by one token: everything that it reads and writes is at a fixed address."""
        with self._routed(with_adapters):
            logits = self._run(self._ids, self._position_ids, self._cache_position, self._mask)
        self._ids.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self._position_ids += 1
        self._cache_position += 1


def _static_cache(config: Any, max_length: int) -> Any:
    """Return a cache that keeps on the device how far it is filled.

    The layers of sliding windows count on the host, and a graph would repeat the number they had at
    its capture; a window that holds all tokens is like no window.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    cache: Any = StaticCache(config=config, max_cache_len=max_length)
    if any(layer.max_cache_len < max_length for layer in cache.layers):
        raise ValueError(
            f"the model has layers with a sliding window shorter than max_length = {max_length}, "
            "whose cache cannot be replayed"
        )
    cache.layers = [
        StaticLayer(max_cache_len=max_length) if layer.is_sliding else layer
        for layer in cache.layers
    ]
    return cache


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """Return the replay of a step's graph; the step is called once before it is captured."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # what is made or chosen at the first call must not be in the graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
