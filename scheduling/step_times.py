"""How long a worker's next step takes: a protocol that latency models implement, and one made of measured speeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

UNKNOWN_PREFILL_TOKENS_PER_S = 1_000.0  # until any worker has measured itself; low, so that little is sent on a guess

# Sequences that make a step of one twice as long: few, so that the noise of measured steps is soon outweighed.
_DOUBLING_BATCH = 8


class StepTimes(Protocol):
    """Seconds of one engine step of one worker. The planner's latency models have these methods too."""

    def prefill_step_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        """One step of prompt chunks: (new tokens, tokens already in the KV cache) of each sequence."""
        ...

    def decode_step_s(self, batch: int, context_tokens: int) -> float:
        """One step that gives each of `batch` sequences a token; `context_tokens` is the sum of their contexts."""
        ...

    def mixed_step_s(self, chunks: Sequence[tuple[int, int]], batch: int, context_tokens: int) -> float:
        """One step of chunked prefill: prompt chunks beside a decode batch."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredTimes:
    """Steps as a worker measured them of late. Implements `StepTimes`.

    Coarse: a prompt token costs the mean of late, and a decode step what it last did, more or less by the batch. But
    for the batch, a worker whose last step happened to be quick would get every request until it says otherwise.
    """

    prefill_tokens_per_s: float  # 0: unknown, and then no prompt is short enough
    decode_step_time_s: float  # 0: it has not decoded yet
    decode_batch: float = 0.0  # sequences of the steps that took so long; 0: unknown, and then any take so long

    def prefill_step_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        tokens = sum(new for new, _ in chunks)
        return tokens / self.prefill_tokens_per_s if self.prefill_tokens_per_s else math.inf

    def decode_step_s(self, batch: int, context_tokens: int) -> float:
        if not batch:
            return 0.0
        return self.decode_step_time_s * (batch + _DOUBLING_BATCH) / ((self.decode_batch or batch) + _DOUBLING_BATCH)

    def mixed_step_s(self, chunks: Sequence[tuple[int, int]], batch: int, context_tokens: int) -> float:
        return self.prefill_step_s(chunks) + self.decode_step_s(batch, context_tokens)


def known_or_best(tokens_s: Sequence[float]) -> list[float]:
    """Seconds a prompt token of each worker. Who has computed none yet (inf) is taken to be as fast as the best of the
    others: unknown, it would draw nobody, or everybody."""
    best_s = min(filter(math.isfinite, tokens_s), default=1 / UNKNOWN_PREFILL_TOKENS_PER_S)
    return [token_s if math.isfinite(token_s) else best_s for token_s in tokens_s]
