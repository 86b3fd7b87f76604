"""What a backend reads of an engine's batch, and a plain form of it for engines that have none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class ForwardModeLike(Protocol):
    """The questions asked of ``forward_mode``; SGLang's ForwardMode answers them."""

    def is_idle(self) -> bool:
        """Whether there are no tokens."""

    def is_decode(self) -> bool:
        """Whether every request has one token."""

    def is_target_verify(self) -> bool:
        """Whether every request has ``spec_info.draft_token_num`` tokens."""

    def is_extend(self) -> bool:
        """Whether ``extend_seq_lens_cpu`` counts the tokens; may hold for target_verify too."""

    def is_draft_extend_v2(self) -> bool:
        """Whether an extend wants the logits of all its rows."""


class SpecInfoLike(Protocol):
    """The speculative decoding of a batch."""

    @property
    def draft_token_num(self) -> int:
        """Tokens of each request."""


class ForwardBatchLike(Protocol):
    """The fields read; SGLang's ForwardBatch has them."""

    @property
    def batch_size(self) -> int:
        """Requests."""

    @property
    def forward_mode(self) -> ForwardModeLike:
        """What kind of batch it is."""

    @property
    def extend_seq_lens_cpu(self) -> Sequence[int] | None:
        """Tokens of each request, in extend mode."""

    @property
    def extend_logprob_start_lens_cpu(self) -> Sequence[int] | None:
        """Where each request's logprobs start, with ``return_logprob``."""

    @property
    def return_logprob(self) -> bool:
        """Whether lm_head gets more rows than the last one of each request."""

    @property
    def spec_info(self) -> SpecInfoLike | None:
        """Set in target_verify mode."""


class ForwardMode(Enum):
    """The kinds of batches."""

    IDLE = "idle"
    DECODE = "decode"
    EXTEND = "extend"
    TARGET_VERIFY = "target_verify"
    DRAFT_EXTEND = "draft_extend"

    def is_idle(self) -> bool:
        """Whether there are no tokens."""
        return self is ForwardMode.IDLE

    def is_decode(self) -> bool:
        """Whether every request has one token."""
        return self is ForwardMode.DECODE

    def is_target_verify(self) -> bool:
        """Whether every request has the same number of drafted tokens."""
        return self is ForwardMode.TARGET_VERIFY

    def is_extend(self) -> bool:
        """Whether requests have several tokens."""
        return not (self.is_idle() or self.is_decode())

    def is_draft_extend_v2(self) -> bool:
        """Whether an extend wants the logits of all its rows."""
        return self is ForwardMode.DRAFT_EXTEND


@dataclass(frozen=True)
class SpecInfo:
    """The speculative decoding of a batch: tokens of each request."""

    draft_token_num: int


@dataclass(frozen=True)
class ForwardBatch:
    """A batch as ``LoRABackend.prepare_lora_batch`` reads it; the constructors below make them."""

    batch_size: int
    forward_mode: ForwardMode
    extend_seq_lens_cpu: Sequence[int] | None = None
    extend_logprob_start_lens_cpu: Sequence[int] | None = None
    return_logprob: bool = False
    spec_info: SpecInfo | None = None

    @classmethod
    def decode(cls, batch_size: int) -> ForwardBatch:
        """Make a batch with one token for each request."""
        return cls(batch_size, ForwardMode.DECODE)

    @classmethod
    def verify(cls, batch_size: int, num_tokens: int) -> ForwardBatch:
        """Make a batch with ``num_tokens`` drafted tokens for each request."""
        return cls(batch_size, ForwardMode.TARGET_VERIFY, spec_info=SpecInfo(num_tokens))

    @classmethod
    def extend(
        cls,
        seq_lens: Sequence[int],
        *,
        logprob_starts: Sequence[int] | None = None,
        all_logits: bool = False,
    ) -> ForwardBatch:
        """Make a prefill of ``seq_lens`` tokens.

        lm_head sees the last token of each request; with ``logprob_starts`` those from there on,
        with ``all_logits`` all of them.
        """
        return cls(
            len(seq_lens),
            ForwardMode.DRAFT_EXTEND if all_logits else ForwardMode.EXTEND,
            seq_lens,
            logprob_starts,
            logprob_starts is not None,
        )


def tokens_per_request(batch: ForwardBatchLike) -> Sequence[int] | None:
    """Tokens of each request, known on the host; None: one each.

    Raises:
        ValueError: the batch does not say.
    """
    mode = batch.forward_mode
    if mode.is_idle():
        return []
    if mode.is_decode():
        return None
    if mode.is_target_verify():
        if batch.spec_info is None:
            raise ValueError("a target_verify batch needs spec_info.draft_token_num")
        return [batch.spec_info.draft_token_num] * batch.batch_size
    counted = mode.is_extend() or mode.is_draft_extend_v2()
    if counted and batch.extend_seq_lens_cpu is not None:
        return batch.extend_seq_lens_cpu
    raise ValueError(f"forward_mode {mode} without extend_seq_lens_cpu is not supported")


def rows_of_lm_head(batch: ForwardBatchLike) -> list[int] | None:
    """Rows of each request that lm_head sees; None: all of them.

    A prefill keeps the last token of each request, or those from ``extend_logprob_start_lens_cpu``
    on, at least one.
    """
    mode = batch.forward_mode
    if not mode.is_extend() or mode.is_target_verify() or mode.is_draft_extend_v2():
        return None
    if not batch.return_logprob:
        return [1] * batch.batch_size
    lens, starts = batch.extend_seq_lens_cpu, batch.extend_logprob_start_lens_cpu
    if lens is None or starts is None:
        raise ValueError("return_logprob needs extend_seq_lens_cpu and its logprob start lengths")
    rows = [1 if n == start else n - start for n, start in zip(lens, starts, strict=True)]
    if min(rows, default=0) < 0:
        raise ValueError(f"logprobs start at {list(starts)} in requests of {list(lens)} tokens")
    return rows
