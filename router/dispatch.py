"""The life of a request in the router: call, grant, prefill, stream, retry, and exactly one end.

Everything here, and in `waiting.py`, runs on the event loop and never awaits, so a message is handled whole before the
next: the only task of a request is the one that reads its answer (`Reading`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from ..core.api_key import ANYBODY, ApiKey, Scope
from ..core.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    KvCorrupted,
    Overloaded,
    SplitserveError,
    Superseded,
    TransferFailed,
    WorkerLost,
)
from ..core.events import Event, Recorder
from ..core.metrics import RouterMetrics
from ..core.request import FinishReason, Request
from ..proto import kv_transfer_pb2
from ..scheduling.admission import Admission
from ..scheduling.attempts import NewTokens, first_attempt
from ..scheduling.prefix_feed import PrefixChanges
from ..scheduling.retries import RetryRules
from ..scheduling.routing import RoutingPolicy
from .idempotency import EndedRequests, can_read, check_same
from .job import Job, Phase
from .membership import WorkerPool
from .outcomes import Outcomes
from .reading import Reading
from .routing_view import RoutingView
from .session import DecodeReport, PrefillReport, TransferReport, WorkerLink
from .timeline import Timeline
from .waiting import WaitingRequests

logger = logging.getLogger(__name__)


class Dispatcher:
    """All live requests of one router. Implements `WorkerEvents`.

    Args:
        policy: chooses the workers of a request.
        retries: what becomes of a request whose attempt failed.
        keep_answers_s: how long the answer to a finished request can be asked for again.
        no_worker_wait_s: how long a request waits while nobody can serve it.
        ageing_s: waiting that is worth one step of priority.
    """

    def __init__(
        self,
        pool: WorkerPool,
        routing: RoutingView,
        admission: Admission,
        metrics: RouterMetrics,
        recorder: Recorder,
        *,
        policy: RoutingPolicy,
        retries: RetryRules,
        keep_answers_s: float,
        no_worker_wait_s: float,
        ageing_s: float,
    ) -> None:
        self._pool = pool
        self._routing = routing
        self._admission = admission
        self._metrics = metrics
        self._recorder = recorder
        self._retries = retries
        self._ended = EndedRequests(keep_answers_s)
        self._jobs: dict[str, Job] = {}
        self.waiting = WaitingRequests(
            pool,
            routing,
            policy,
            admission,
            metrics,
            ageing_s=ageing_s,
            no_worker_wait_s=no_worker_wait_s,
            end=self._end,
        )
        self.outcomes = Outcomes(metrics)
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def num_live(self) -> int:
        return len(self._jobs)

    def check_room(self, request_id: str, num_preparing: int) -> None:
        """Whether there is room for one more besides those on their way to `open`. Raises: Overloaded."""
        if request_id in self._jobs or self._ended.finished(request_id) is not None:
            return  # another call for what is here already
        self.waiting.check_room(self.num_live + num_preparing)

    @contextmanager
    def open(
        self,
        request: Request,
        *,
        arrived_at: float,
        deadline_at: float,
        call: int = 0,
        digest: bytes = b"",
        prompt_ids: Sequence[int] = (),
    ) -> Iterator[Reading]:
        """Submit a request, or take it over from an earlier call; on leaving, whatever it still holds is freed.

        Args:
            call: how often the client asked before; see `GenerateRequest.call`.
            digest: of the request; a key that comes with another one is refused.
            prompt_ids: the prompt's, in a message.
        Raises: Overloaded: no room, the first token would come too late, or the key has had its share.
            IdempotencyConflict: the id is another request's. DeadlineExceeded: it is past.
        """
        reading = self._take_over(request, arrived_at, deadline_at, digest)
        if reading is None:
            job = self._submit(request, arrived_at, deadline_at, call, digest, prompt_ids)
            reading = job.read(len(request.output_token_ids))
        job = reading.job
        try:
            yield reading
        finally:
            if job.reading is reading:
                if time.monotonic() >= job.deadline_at:  # gRPC ends the call at the same moment as our timer does
                    self._expire(job)
                self._end(job, Cancelled("the client went away"))
                job.reading = None

    def _take_over(self, request: Request, arrived_at: float, deadline_at: float, digest: bytes) -> Reading | None:
        """The answer of a live or just finished request, read from where the client is; None: nothing that helps."""
        job = self._jobs.get(request.request_id) or self._ended.finished(request.request_id)
        if job is None:
            return None
        check_same(job, digest)
        if not can_read(job, request, deadline_at):
            self._end(job, Superseded("a later call with this idempotency key began the request anew"))
            return None
        reading = job.read(len(request.output_token_ids))
        job.called_at = arrived_at
        self._metrics.takeovers.labels("replayed" if job.answer.ended else "attached").inc()
        return reading

    def _submit(
        self,
        request: Request,
        arrived_at: float,
        deadline_at: float,
        call: int,
        digest: bytes,
        prompt_ids: Sequence[int],
    ) -> Job:
        timeline = Timeline(request_id=request.request_id, arrived_at=arrived_at, recorder=self._recorder)
        timeline.mark(Event.ARRIVED, arrived_at)
        now = time.monotonic()
        if deadline_at <= now:
            raise DeadlineExceeded("the deadline is in the past; send the request with more time")
        attempt = max(first_attempt(call), self._ended.last_attempt(request.request_id) + 1)
        request = replace(request, attempt=attempt)
        self.outcomes.traffic.arrived(request.num_tokens)
        ticket = self.waiting.ticket(request, arrived_at)
        job = Job(request, timeline, deadline_at, ticket, digest, prompt_ids)
        self.waiting.admit(job, self.num_live)
        timeline.mark(Event.ADMITTED, now)
        self._retries.budget.admitted(now)
        loop = asyncio.get_running_loop()
        job.deadline_timer = loop.call_later(deadline_at - now, self._expire, job)
        self._jobs[request.request_id] = job
        self._metrics.live.set(len(self._jobs))
        self.idle.clear()
        if call > 0:
            self._claim(request.request_id, call)
        self.waiting.enqueue(job)
        return job

    def _claim(self, request_id: str, call: int) -> None:
        """Whatever earlier calls have running anywhere, by whichever router, ends now."""
        self._metrics.takeovers.labels("claimed").inc()
        for link in self._pool:
            link.claim(request_id, first_attempt(call))

    def finish(self, job: Job) -> None:
        """The router itself found the end of the answer: a stop string."""
        job.answer.finish_reason = FinishReason.STOP
        self._end(job, None)

    def cancel(self, request_id: str, key: ApiKey = ANYBODY) -> bool:
        """End a live request; False if there is none of this id that `key` may end."""
        job = self._jobs.get(request_id)
        if job is None or not (job.request.key.name == key.name or Scope.ADMIN in key.scopes):
            return False
        self._end(job, Cancelled("the request was cancelled"))
        return True

    def close(self, error: SplitserveError) -> None:
        """End every request with the error."""
        for job in list(self._jobs.values()):
            self._end(job, error)

    # What workers tell.

    def workers_changed(self) -> None:
        self.waiting.workers_changed()

    def granted(self, worker: WorkerLink, grant: kv_transfer_pb2.Grant) -> None:
        job = self._live(worker, grant.request_id, grant.attempt)
        if job is None or job.timeline.granted_at is not None or job.prefill is None:
            return
        if job.phase is Phase.GRANTING and job.prefill.state != "ready":  # it began to drain meanwhile
            self._requeue(job)
            return
        now = time.monotonic()
        job.timeline.granted_at = now
        job.timeline.mark(Event.GRANTED, now, grant.attempt, worker=worker.worker_id)
        if job.phase is Phase.GRANTING:
            job.run_prefill(job.prefill, now, grant)
        else:
            job.prefill.grant(grant)
        self._admission.ttft.dispatched(now, job.ticket.cost, self.waiting.num_queued)

    def first_token(self, worker: WorkerLink, tokens: NewTokens, report: PrefillReport) -> None:
        job = self._live(worker, tokens.request_id, tokens.attempt)
        if job is None or job.prefill is None:
            return
        job.timeline.prefill = report
        if report.ungranted and job.timeline.granted_at is None:  # no grant will say that it left the queue for good
            self._admission.ttft.dispatched(time.monotonic(), job.ticket.cost, self.waiting.num_queued)
        self.outcomes.traffic.prefilled(report.num_cached_tokens)
        if job.phase is Phase.DECODING:  # the KV was faster
            job.prefill.detach(tokens.request_id)
        else:
            job.prefill.prefilled(tokens.request_id)
        self._extend(job, worker, tokens)
        self.waiting.pump()

    def transferred(self, worker: WorkerLink, tokens: NewTokens, report: TransferReport) -> None:
        job = self._live(worker, tokens.request_id, tokens.attempt)
        if job is None or job.prefill is None:
            return
        now = time.monotonic()
        job.phase = Phase.DECODING
        job.timeline.transfer = report
        job.timeline.mark(Event.TRANSFER_FINISHED, now, tokens.attempt, num_bytes=report.num_bytes)
        job.timeline.mark(Event.DECODE_QUEUED, now, tokens.attempt, worker=worker.worker_id)
        if job.timeline.prefill is None and (job.wants_logprobs or job.ends_with(tokens)):
            # Only the prefill worker knows them for the first token and the prompt, and nobody else will say that the
            # answer is complete: its word is still needed.
            return
        job.prefill.detach(tokens.request_id)  # from here on its death does not matter
        self._extend(job, worker, tokens)

    def decoded(self, worker: WorkerLink, tokens: NewTokens, report: DecodeReport | None) -> None:
        job = self._live(worker, tokens.request_id, tokens.attempt)
        if job is None:
            return
        if not job.timeline.decoding:
            job.timeline.decoding = True
            job.timeline.mark(Event.DECODE_STARTED, time.monotonic(), tokens.attempt, worker=worker.worker_id)
        if report is not None:
            job.timeline.decode = report
        self._extend(job, worker, tokens)

    def failed(self, worker: WorkerLink, request_id: str, attempt: int, error: SplitserveError) -> None:
        job = self._live(worker, request_id, attempt)
        if job is None or request_id not in worker.runs:
            return
        worker.detach(request_id)
        no_room = worker is job.decode and job.timeline.asked_at is not None and job.timeline.granted_at is None
        if isinstance(error, Overloaded) and (
            no_room or len(job.answer.token_ids) == len(job.request.output_token_ids)
        ):
            # Refused before any work was done, but for a prompt's that did not wait for its grant: no failure, the
            # request waits for room as it would have before.
            worker.refused()
            self.waiting.refused(job)
            self._requeue(job)
        elif isinstance(error, Superseded) and error.age_s > time.monotonic() - job.called_at:
            # By a call that came before ours, of a client that does not number its calls: the later one goes on.
            self._claim(request_id, error.newest_call + 1)
            self._requeue(job, call=error.newest_call + 1)
        else:
            self._attempt_failed(job, worker, error)

    def prefixes_changed(self, worker: WorkerLink, changes: PrefixChanges) -> bool:
        return self._routing.index.apply(worker.address, changes)

    def lost(self, worker: WorkerLink, error: WorkerLost | Draining) -> None:
        self._routing.index.drop(worker.address)
        for request_id in list(worker.runs):
            worker.detach(request_id)
            self._attempt_failed(self._jobs[request_id], worker, error)

    # Attempts and the end.

    def _live(self, worker: WorkerLink, request_id: str, attempt: int) -> Job | None:
        """The job that a message is for; None, and counted, if it is of a revoked attempt or of nobody."""
        job = self._jobs.get(request_id)
        if job is None or attempt != job.answer.attempt or (worker is not job.prefill and worker is not job.decode):
            self._metrics.stale_messages.inc()
            return None
        return job

    def _extend(self, job: Job, worker: WorkerLink, tokens: NewTokens) -> None:
        try:
            grown = job.answer.accept(tokens)
        except KvCorrupted as error:
            self._attempt_failed(job, worker, error)
            return
        if grown:
            self._metrics.tokens.inc(grown)
            job.timeline.last_token_at = now = time.monotonic()
            if job.timeline.first_token_at is None:
                job.timeline.first_token_at = now
                job.timeline.mark(Event.FIRST_TOKEN, now, tokens.attempt)
                if job.predicted_ttft_s is not None and job.failures.num == 0:
                    self._admission.ttft.measured(job.predicted_ttft_s, now - job.timeline.arrived_at)
            job.wake_reader()
        if job.answer.finish_reason is not None:
            if job.decode is not None and job.timeline.prefill is not None and job.timeline.prefill.ungranted:
                job.decode.cancel(tokens.request_id, tokens.attempt)  # nobody else would tell it
            for link in (job.prefill, job.decode):  # both free by themselves what a complete answer held
                if link is not None:
                    link.detach(tokens.request_id)
            self._end(job, None)

    def _attempt_failed(self, job: Job, worker: WorkerLink, error: SplitserveError) -> None:
        leaving = job.prefill is not None and job.prefill.status.draining
        if isinstance(error, Draining) or (leaving and isinstance(error, TransferFailed)):
            # Nothing failed, and that worker takes no more work.
            self._metrics.handed_over.inc()
            self._requeue(job)
            return
        now = time.monotonic()
        try:
            delay_s = self._retries.delay_s(
                job.failures,
                error,
                boot_id=worker.boot_id if job.is_computed_by(worker) else "",
                alive=self._pool.boot_ids,
                num_tokens=len(job.answer.token_ids),
                now=now,
                num_live=self.num_live,
            )
        except SplitserveError as final:
            self._end(job, final)
            return
        # A transfer's failure is told by the receiver; the sender is as likely its cause, and is the cheaper to avoid.
        culprit = job.prefill if isinstance(error, TransferFailed) and job.prefill is not None else worker
        job.avoid.add(culprit.address)
        self._metrics.retries.inc()
        self._metrics.retries_left.set(self._retries.budget.left(now, num_live=self.num_live))
        logger.warning("request %s: attempt %d: %s", job.request.request_id, job.request.attempt, error.message)
        self._requeue(job, delay_s=delay_s)

    def _requeue(self, job: Job, *, delay_s: float = 0.0, call: int = 0) -> None:
        """Revoke the attempt and queue the next."""
        job.next_attempt(call)
        if delay_s > 0:
            job.phase = Phase.BACKING_OFF
            job.retry_timer = asyncio.get_running_loop().call_later(delay_s, self.waiting.enqueue, job)
        else:
            self.waiting.enqueue(job)

    def _expire(self, job: Job) -> None:
        given = len(job.answer.token_ids)
        self._end(
            job, DeadlineExceeded(f"the deadline passed while the request was {job.phase.value}, after {given} tokens")
        )

    def _end(self, job: Job, error: SplitserveError | None) -> None:
        """The one terminal event; later calls do nothing."""
        if not job.answer.end():
            return
        now = time.monotonic()
        self.waiting.ended(job, now)
        job.free()
        del self._jobs[job.request.request_id]
        job.error = error
        self._ended.add(job)
        job.timeline.ended_at = now
        self.outcomes.ended(job, now, num_live=len(self._jobs))
        if not self._jobs:
            self.idle.set()
        job.wake_reader()
        self.waiting.pump()
