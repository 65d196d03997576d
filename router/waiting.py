"""The requests that wait for workers: who is let in, who is placed where and when, and who has waited in vain."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping

from ..core.errors import Overloaded, SplitserveError
from ..core.metrics import RouterMetrics
from ..core.request import Request
from ..scheduling.admission import Admission
from ..scheduling.dispatch_order import dispatch
from ..scheduling.fair_queue import FairQueue, Ticket
from ..scheduling.quotas import Quotas
from ..scheduling.routing import ClusterView, Placement, PrefillLoad, RoutingPolicy, Snapshot
from .job import Job, Phase
from .membership import WorkerPool
from .patience import Patience
from .routing_view import RoutingView


class WaitingRequests:
    """Of one router. Implements `scheduling.dispatch_order.Source`.

    Args:
        policy: chooses the workers of a request.
        ageing_s: waiting that is worth one step of priority.
        no_worker_wait_s: how long a request waits while nobody can serve it.
        end: ends a request.
    """

    def __init__(
        self,
        pool: WorkerPool,
        routing: RoutingView,
        policy: RoutingPolicy,
        admission: Admission,
        metrics: RouterMetrics,
        *,
        ageing_s: float,
        no_worker_wait_s: float,
        end: Callable[[Job, SplitserveError], None],
    ) -> None:
        self._pool = pool
        self._routing = routing
        self._policy = policy
        self._admission = admission
        self._metrics = metrics
        self._end = end
        self._queue: FairQueue[Job] = FairQueue(ageing_s)
        self._patience = Patience(pool, self._queue, wait_s=no_worker_wait_s, end=end)
        self._quotas = Quotas()
        self._num_tickets = 0
        self._pumping = False

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def num_queued_tokens(self) -> int:
        """To be prefilled for them."""
        return sum(job.request.num_tokens for job in self._queue)

    def ticket(self, request: Request, arrived_at: float) -> Ticket:
        self._num_tickets += 1
        return Ticket(
            order=self._num_tickets,
            arrived_at=arrived_at,
            cost=request.num_tokens,
            tenant=request.key.name or request.tenant,
            weight=request.key.weight,
            priority=request.priority,
        )

    def check_room(self, num_live: int) -> None:
        """Whether there is room for one more. Raises: Overloaded."""
        try:
            self._admission.check(num_queued=self.num_queued, num_live=num_live)
        except Overloaded:
            self._metrics.overloaded.inc()
            raise

    def admit(self, job: Job, num_live: int) -> None:
        """Let a request in; `ended` must follow. Raises: Overloaded."""
        key, num_tokens, now = job.request.key, job.request.num_prompt_tokens, time.monotonic()
        self._quotas.begin(key, num_tokens, now, resumes=bool(job.num_given))
        try:
            if job.num_given:  # its first token came from another router, its client is reading: it goes on if it can
                self._admission.check(num_queued=self.num_queued, num_live=num_live)
                return
            job.predicted_ttft_s = self._admission.admit(
                job.ticket,
                deadline_at=job.deadline_at,
                queue=self._queue,
                num_live=num_live,
                prefills=self._prefill_loads(),
            )
        except Overloaded:
            self._quotas.take_back(key, num_tokens, now)
            self._metrics.overloaded.inc()
            raise

    def enqueue(self, job: Job) -> None:
        job.phase = Phase.QUEUED
        job.queued_at = time.monotonic()
        self._queue.push(job.ticket, job)
        self._patience.queued([job])
        self.pump()
        if job.phase is Phase.QUEUED and job.untouched and not job.answer.ended:
            at = self._admission.latest_start(job.ticket, deadline_at=job.deadline_at, prefills=self._prefill_loads())
            job.queue_timer = asyncio.get_running_loop().call_later(at - job.queued_at, self._too_late, job)

    def pump(self) -> None:
        """Send off what can be."""
        if self._pumping:
            return  # whoever ends a request below
        self._pumping = True
        try:
            dispatch(self._policy, self, time.monotonic())
        finally:
            self._pumping = False
        self._metrics.queued.set(self.num_queued)
        self._patience.watch()

    def workers_changed(self) -> None:
        self._patience.workers_changed()
        self.pump()

    def refused(self, job: Job) -> None:
        """Its worker had no room for it: its tenant pays nothing."""
        self._queue.charge(job.ticket, -job.ticket.cost)

    def ended(self, job: Job, now: float) -> None:
        """One that was let in has ended, whether or not it still waited."""
        self._patience.left(job)
        self._queue.discard(job.ticket)
        if not self.num_queued:
            self._admission.ttft.emptied()
        num_new = len(job.answer.token_ids) - job.num_given
        self._queue.charge(job.ticket, num_new)
        self._quotas.end(job.request.key, num_new, now)
        self._admission.left(now, arrived_at=job.ticket.arrived_at)

    # Of scheduling.dispatch_order.Source.

    def in_order(self) -> Iterator[Job]:
        return self._patience.in_order()

    def view(self) -> ClusterView:
        return self._routing.view()

    def snapshot(self, job: Job, view: ClusterView, held_tokens: Mapping[str, int]) -> Snapshot:
        return self._routing.snapshot(job, view, held_tokens)

    def start(self, job: Job, placement: Placement) -> None:
        if not self._starts_in_time(job):
            return
        self._queue.serve(job.ticket)
        if job.queue_timer is not None:
            job.queue_timer.cancel()
            job.queue_timer = None
        self._patience.left(job)
        now = time.monotonic()
        decode = self._pool.decodes[placement.decode]
        prefill = self._pool.prefills[placement.prefill] if placement.prefill is not None else None
        self._routing.placed(job, placement)
        job.begin(prefill, decode, now, self._routing.uncached_tokens(job, placement.prefill or placement.decode))
        if prefill is None:  # no grant will say that it left the queue for good
            self._admission.ttft.dispatched(now, job.ticket.cost, self.num_queued)

    def _prefill_loads(self) -> list[PrefillLoad]:
        """Of everybody who computes prompts, whether or not it takes one more right now."""
        loads = [link.load for link in self._pool.prefills.values() if link.state == "ready"]
        return loads or [
            link.prefill_load for link in self._pool.decodes.values() if link.colocated and link.state == "ready"
        ]

    def _starts_in_time(self, job: Job) -> bool:
        """Whether its work would still be worth something; ends it otherwise."""
        if job.queue_timer is None or not job.untouched:  # it did not wait, or its client has begun to read
            return True
        try:
            self._admission.check_start(
                job.ticket, now=time.monotonic(), deadline_at=job.deadline_at, prefills=self._prefill_loads()
            )
        except Overloaded as error:
            self._metrics.overloaded.inc()
            self._end(job, error)
            return False
        return True

    def _too_late(self, job: Job) -> None:
        """It waited in the queue until there was no point in waiting longer."""
        job.queue_timer = None
        if job.phase is Phase.QUEUED and job.untouched and self._pool.usable:
            self._metrics.overloaded.inc()
            self._end(job, self._admission.too_late(self.num_queued))
