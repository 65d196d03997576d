"""One request in the router, from submission to its end: what it asked for, where it runs, what it has so far."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum

from ..core.errors import SplitserveError
from ..core.events import Event
from ..core.kv_geometry import blocks_for
from ..core.request import Request
from ..proto import kv_transfer_pb2
from ..scheduling.attempts import Answer, NewTokens
from ..scheduling.dispatch_order import Awaited
from ..scheduling.fair_queue import Ticket
from ..scheduling.retries import Failures
from .decode_link import DecodeLink
from .prefill_link import PrefillLink
from .reading import Reading
from .routing_view import PrefixOfJob
from .session import WorkerLink
from .timeline import Timeline

_LONG_TOKENS = 1024  # of a prompt that takes many times as long as a grant


class Phase(Enum):
    """What a request that has not ended waits for."""

    QUEUED = "waiting for a worker"
    BACKING_OFF = "waiting to be tried again"
    GRANTING = "waiting for a grant of KV blocks"
    PREFILLING = "being prefilled"
    DECODING = "being decoded"


class Job:
    """One request from submission to its end. Made by `Dispatcher.open`."""

    def __init__(
        self,
        request: Request,
        timeline: Timeline,
        deadline_at: float,
        ticket: Ticket,
        digest: bytes = b"",
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self.asked = request  # as the first call sent it
        self.request = request  # as the live attempt sends it
        self.digest = digest  # of all that makes it this request
        self.prompt_ids = prompt_ids  # in a message, until the end; see `request_to_proto`
        self.answer = Answer(request.output_token_ids, request.attempt)
        self.reading: Reading | None = None  # of the newest call, while that lasts
        self.called_at = timeline.arrived_at  # of the newest call
        self.timeline = timeline
        self.deadline_at = deadline_at
        self.ticket = ticket
        self.predicted_ttft_s: float | None = None
        self.begun_by = ""  # weights of the last attempt
        self.draw = random.getrandbits(64)  # the policy's luck
        self.prefix = PrefixOfJob()
        self.phase = Phase.QUEUED
        self.awaits: Awaited | None = None  # while it is queued
        self.queued_at = timeline.arrived_at
        self.prefill: PrefillLink | None = None
        self.decode: DecodeLink | None = None
        self.avoid: set[str] = set()  # addresses of workers that failed it
        self.failures = Failures()
        self.error: SplitserveError | None = None
        self.deadline_timer: asyncio.TimerHandle | None = None
        self.queue_timer: asyncio.TimerHandle | None = None  # runs while it is queued and has had no attempt
        self.retry_timer: asyncio.TimerHandle | None = None
        self.num_given = len(request.output_token_ids)  # tokens that the client brought

    def read(self, num_received: int) -> Reading:
        """A call's place in the answer, behind what its client has; an older call loses its own."""
        if self.reading is not None:
            self.reading.take_away()
        self.reading = Reading(self, num_received)
        return self.reading

    def wake_reader(self) -> None:
        """There is something to read."""
        if self.reading is not None:
            self.reading.wake()

    @property
    def weights(self) -> str:
        """What computed the tokens that its client has; "" while it has none of ours."""
        return self.begun_by if len(self.answer.token_ids) > self.num_given else ""

    @property
    def untouched(self) -> bool:
        """Nobody has worked for it yet, and its client has nothing."""
        return self.failures.num == 0 and not self.answer.token_ids

    @property
    def wants_logprobs(self) -> bool:
        return self.request.logprobs is not None or self.request.prompt_logprobs is not None

    def ends_with(self, tokens: NewTokens) -> bool:
        """Whether an answer is complete with these tokens."""
        end = tokens.index + len(tokens.token_ids)
        return end >= self.request.max_tokens or tokens.token_ids[-1] in self.request.stop_token_ids

    def is_computed_by(self, worker: WorkerLink) -> bool:
        """Whether the worker computes it, as far as can be known here, rather than only holding something for it."""
        if worker is self.decode:
            return self.phase is Phase.DECODING
        return worker is self.prefill and self.phase is Phase.PREFILLING and self.timeline.prefill is None

    def begin(self, prefill: PrefillLink | None, decode: DecodeLink, now: float, num_tokens: int) -> None:
        """Begin an attempt: ask for a grant, or have a colocated worker do everything.

        Args: num_tokens: of the prompt, that whoever computes it is expected to lack in its cache.
        """
        self.prefill, self.decode = prefill, decode
        self.begun_by = decode.group.weights if decode.group is not None else ""
        self.timeline.dispatched(now, prefill.worker_id if prefill is not None else "", decode.worker_id)
        request, timeout_s, waited_s = self.request, self.deadline_at - now, now - self.timeline.arrived_at
        # The grant will come then, and the prompt does not wait for it. Where something was amiss before, it does.
        is_early = request.attempt == self.asked.attempt and decode.will_grant(request)
        decode.attach(request.request_id, blocks_for(request.num_tokens, decode.block_size))
        if prefill is None:
            self.phase = Phase.DECODING
            self.timeline.mark(Event.PREFILL_QUEUED, now, request.attempt, worker=decode.worker_id)
            decode.run_local(request, timeout_s, waited_s, num_tokens, self.prompt_ids)
        else:
            self.phase = Phase.GRANTING
            prefill.attach(request.request_id, num_tokens, request.num_tokens)
            is_early = is_early and prefill.takes_late_grants
            can_wait = is_early and num_tokens >= _LONG_TOKENS
            decode.request_grant(request, timeout_s, waited_s, prefill, self.prompt_ids, can_wait=can_wait)
            if is_early:
                self.run_prefill(prefill, now)

    def run_prefill(self, prefill: PrefillLink, now: float, grant: kv_transfer_pb2.Grant | None = None) -> None:
        self.phase = Phase.PREFILLING
        self.timeline.mark(Event.PREFILL_QUEUED, now, self.request.attempt, worker=prefill.worker_id)
        prefill.run(self.request, self.deadline_at - now, now - self.timeline.arrived_at, grant, self.prompt_ids)

    def next_attempt(self, call: int) -> None:
        """Revoke the attempt; the next goes on after the tokens that are there."""
        self._revoke()
        attempt = self.answer.next_attempt(call)
        self.request = replace(
            self.request,
            attempt=attempt,
            output_token_ids=tuple(self.answer.token_ids),
            prompt_logprobs=None if self.answer.prompt_logprobs else self.request.prompt_logprobs,
        )
        self.timeline.mark(Event.RESUMED, time.monotonic(), attempt)

    def free(self) -> None:
        """It has ended: let go of all that it holds, here and on its workers."""
        self._revoke()
        for timer in (self.deadline_timer, self.queue_timer, self.retry_timer):
            if timer is not None:
                timer.cancel()
        self.prompt_ids, self.prefix = (), PrefixOfJob()

    def _revoke(self) -> None:
        for link in (self.prefill, self.decode):
            if link is not None:
                link.cancel(self.request.request_id, self.request.attempt)
        self.prefill = self.decode = None
