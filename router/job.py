"""One request in the router, from submission to its end: what it asked for, where it runs, what it has so far."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from enum import Enum

from ..core.errors import SplitserveError
from ..core.request import Request
from ..scheduling.attempts import Answer
from ..scheduling.dispatch_order import Awaited
from ..scheduling.fair_queue import Ticket
from ..scheduling.retries import Failures
from .decode_link import DecodeLink
from .prefill_link import PrefillLink
from .reading import Reading
from .routing_view import PrefixOfJob
from .session import WorkerLink
from .timeline import Timeline


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

    def is_computed_by(self, worker: WorkerLink) -> bool:
        """Whether the worker computes it, as far as can be known here, rather than only holding something for it."""
        if worker is self.decode:
            return self.phase is Phase.DECODING
        return worker is self.prefill and self.phase is Phase.PREFILLING and self.timeline.prefill is None
