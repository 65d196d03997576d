"""What the router lets in: bounded queues, limits of the model, first tokens in time. Time is an argument."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from ..core.api_key import ANYBODY, ApiKey
from ..core.errors import ModelNotFound, Overloaded
from ..core.request import OutputFormat, Request, SamplingParams
from .fair_queue import FairQueue, Ticket
from .routing import PrefillLoad
from .ttft import TtftPredictor

MIN_RETRY_AFTER_S = 0.1
MAX_RETRY_AFTER_S = 30.0
_LEAST_START = 0.02  # of the time that a request has: so long before its end it is told, not after
_MOST_MARGIN = 0.5  # of that time, for errors of the prediction

AdmissionPolicy = Literal["refuse", "queue"]
T = TypeVar("T")


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
    session: bytes = b"",
    min_tokens: int = 0,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    output_format: OutputFormat | None = None,
    key: ApiKey = ANYBODY,
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
        session=session,
        min_tokens=min_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        output_format=output_format,
        key=key,
    )
    request.validate(max_model_len=limits.max_model_len, vocab_size=limits.vocab_size)
    return request


class Admission:
    """Refuses what would only wait, and tells when to come back.

    Args:
        max_queued: requests waiting for dispatch.
        max_live: requests not ended, those waiting included.
        policy: of a request that cannot have its first token in time: "refuse" it at once, or "queue" it all the same.
        ttft_target_s: seconds from arrival within which a first token is worth its work; None: until the deadline.
    """

    def __init__(
        self,
        *,
        max_queued: int,
        max_live: int,
        policy: AdmissionPolicy = "refuse",
        ttft_target_s: float | None = None,
    ) -> None:
        self.max_queued = max_queued
        self.max_live = max_live
        self.ttft = TtftPredictor()
        self._policy = policy
        self.ttft_target_s = ttft_target_s if policy == "refuse" and ttft_target_s is not None else math.inf
        self._interval_s = 0.0  # between requests leaving, averaged over the last 20 or so
        self._left_at: float | None = None

    def admit(
        self,
        ticket: Ticket,
        *,
        deadline_at: float,
        queue: FairQueue[T],
        num_arriving: int = 0,
        num_live: int,
        prefills: Sequence[PrefillLoad],
    ) -> float | None:
        """Seconds to the first token, as predicted; None: unknown, since no worker has told its speed.

        Args:
            num_arriving: requests let in that are not in the queue yet.
            prefills: every worker that computes prompts.
        Raises: Overloaded: there is no room, or it would come too late.
        """
        self.check(num_queued=len(queue) + num_arriving, num_live=num_live)
        predicted_s = self.ttft.predict(prefills, queue.cost_ahead(ticket), ticket.cost)
        idle = not len(queue) and _any_idle(prefills)  # then it would wait for nobody, and its speed becomes known
        if predicted_s is not None and self._policy == "refuse" and not idle:
            margin_s = min(self.ttft.margin_s, _MOST_MARGIN * self._limit_s(ticket, deadline_at))
            self._check_time(predicted_s + margin_s, ticket, deadline_at)
        return predicted_s

    def check_start(self, ticket: Ticket, *, now: float, deadline_at: float, prefills: Sequence[PrefillLoad]) -> None:
        """Once more when its turn comes, for it may have waited longer than was foreseen.

        Raises: Overloaded: it would come too late, and its work would be for nothing.
        """
        predicted_s = 0.0 if _any_idle(prefills) else self.ttft.predict(prefills, 0.0, ticket.cost) or 0.0
        self._check_time(now - ticket.arrived_at + predicted_s, ticket, deadline_at)

    def latest_start(self, ticket: Ticket, *, deadline_at: float, prefills: Sequence[PrefillLoad]) -> float:
        """When at the latest it must leave the queue; inf: never too late. A little before what is just possible."""
        limit_s = self._limit_s(ticket, deadline_at)
        return ticket.arrived_at + limit_s - max(self.ttft.prefill_s(prefills, ticket.cost), _LEAST_START * limit_s)

    def too_late(self, num_queued: int) -> Overloaded:
        """What somebody is told whose latest start has passed in the queue."""
        return Overloaded(
            "the request waited so long for a worker that its first token would have come too late; "
            "try again later or add workers",
            retry_after_s=self.retry_after_s(num_queued or 1),
        )

    def left(self, now: float, *, arrived_at: float) -> None:
        """A request that came at `arrived_at` ended, and made room."""
        if self._left_at is not None:
            gap_s = now - max(self._left_at, arrived_at)  # a quiet night before it came is no pace
            self._interval_s += 0.05 * (gap_s - self._interval_s)
        self._left_at = now

    def retry_after_s(self, num_waiting: int) -> float:
        """Time until `num_waiting` requests have left at the recent pace."""
        return _within_bounds(num_waiting * self._interval_s)

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

    def _limit_s(self, ticket: Ticket, deadline_at: float) -> float:
        return min(self.ttft_target_s, deadline_at - ticket.arrived_at)

    def _check_time(self, ttft_s: float, ticket: Ticket, deadline_at: float) -> None:
        limit_s = self._limit_s(ticket, deadline_at)
        if ttft_s > limit_s:
            what = "the target" if limit_s == self.ttft_target_s else "its deadline"
            raise Overloaded(
                f"the first token would come after about {ttft_s:.2g} s, {what} is {limit_s:.2g} s; "
                "try again later or add workers",
                retry_after_s=_within_bounds(ttft_s - limit_s),
            )


def _any_idle(prefills: Sequence[PrefillLoad]) -> bool:
    return any(not load.outstanding_tokens for load in prefills)


def _within_bounds(retry_after_s: float) -> float:
    return min(max(retry_after_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)
