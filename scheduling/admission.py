"""What the router lets in: bounded queue, bounded number of live requests, limits of the model. Time is an argument."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.errors import ModelNotFound, Overloaded
from ..core.request import OutputFormat, Request, SamplingParams

MIN_RETRY_AFTER_S = 0.1
MAX_RETRY_AFTER_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What the served model can take: the least of what its workers say."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int] = frozenset()


def check_model(asked: str, served: Sequence[str]) -> None:
    """Raises: ModelNotFound. An empty name asks for the only model."""
    if asked and asked not in served:
        raise ModelNotFound(f"model {asked!r} is not served here; served: {', '.join(served)}", field="model")


def make_request(
    *,
    request_id: str,
    prompt_token_ids: Sequence[int],
    limits: ModelLimits,
    sampling: SamplingParams,
    timeout_s: float,
    max_tokens: int | None = None,
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    output_token_ids: Sequence[int] = (),
    priority: int = 0,
    tenant: str = "",
    min_tokens: int = 0,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    output_format: OutputFormat | None = None,
) -> Request:
    """The request as workers will see it. `max_tokens` None means as many as the model has room for.

    Raises: InvalidRequest, PromptTooLong: the model cannot serve it.
    """
    if max_tokens is None:
        max_tokens = max(1, limits.max_model_len - len(prompt_token_ids))
    request = Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt_token_ids),
        output_token_ids=tuple(output_token_ids),
        max_tokens=max_tokens,
        sampling=sampling,
        stop_token_ids=frozenset(stop_token_ids) | (frozenset() if ignore_eos else limits.eos_token_ids),
        ignore_eos=ignore_eos,
        priority=priority,
        timeout_s=timeout_s,
        tenant=tenant,
        min_tokens=min_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        output_format=output_format,
    )
    request.validate(max_model_len=limits.max_model_len, vocab_size=limits.vocab_size)
    return request


class Admission:
    """Refuses what would only wait, and tells when to come back.

    Args:
        max_queued: requests waiting for dispatch.
        max_live: requests not ended, those waiting included.
    """

    def __init__(self, *, max_queued: int, max_live: int) -> None:
        self.max_queued = max_queued
        self.max_live = max_live
        self._interval_s = 0.0  # between requests leaving, averaged over the last 20 or so
        self._left_at: float | None = None

    def left(self, now: float) -> None:
        """A request ended, and made room."""
        if self._left_at is not None:
            self._interval_s += 0.05 * (now - self._left_at - self._interval_s)
        self._left_at = now

    def retry_after_s(self, num_waiting: int) -> float:
        """Time until `num_waiting` requests have left at the recent pace."""
        return min(max(num_waiting * self._interval_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)

    def check(self, *, num_queued: int, num_live: int) -> None:
        """Raises: Overloaded: no room for one more."""
        for got, most, what in (
            (num_queued, self.max_queued, "requests wait for a worker"),
            (num_live, self.max_live, "requests are live"),
        ):
            if got >= most:
                raise Overloaded(
                    f"{got:,} {what}, the router's limit; try again later or add workers",
                    retry_after_s=self.retry_after_s(num_queued or 1),
                )
