"""What passes through one router, in counts that only grow: the controller learns from them what pools must carry."""

from __future__ import annotations

from ..core.duration_counts import DurationCounts
from ..proto import inference_pb2
from .timeline import Timeline


class Traffic:
    """Told by the dispatcher of every request that comes, is prefilled and ends."""

    def __init__(self) -> None:
        self._num_arrived = 0
        self._prompt_tokens = 0
        self._prompt_tokens_squared = 0.0
        self._cached_tokens = 0
        self._num_ended = 0
        self._output_tokens = 0
        self._ttft = DurationCounts()
        self._tpot = DurationCounts()

    def arrived(self, num_tokens: int) -> None:
        """One that may yet be refused; of `num_tokens` to prefill."""
        self._num_arrived += 1
        self._prompt_tokens += num_tokens
        self._prompt_tokens_squared += num_tokens**2

    def prefilled(self, num_cached_tokens: int) -> None:
        """So many tokens of its prompt were in a prefix cache."""
        self._cached_tokens += num_cached_tokens

    def ended(self, timeline: Timeline, num_tokens: int, *, now: float) -> None:
        """One whose answer began."""
        self._num_ended += 1
        self._output_tokens += num_tokens
        if timeline.first_token_at is None:
            return
        self._ttft.add(timeline.first_token_at - timeline.arrived_at)
        if num_tokens > 1:
            self._tpot.add((now - timeline.first_token_at) / (num_tokens - 1))

    def counts(self, queued_tokens: int) -> inference_pb2.TrafficCounts:
        return inference_pb2.TrafficCounts(
            num_arrived=self._num_arrived,
            prompt_tokens=self._prompt_tokens,
            prompt_tokens_squared=self._prompt_tokens_squared,
            cached_tokens=self._cached_tokens,
            num_ended=self._num_ended,
            output_tokens=self._output_tokens,
            ttft_counts=self._ttft.counts,
            tpot_counts=self._tpot.counts,
            queued_prompt_tokens=queued_tokens,
        )
