"""How long queued requests wait for workers that may never come: any at all, or any that has their weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator

from ..core.errors import SplitserveError, Unavailable
from ..scheduling.fair_queue import FairQueue
from .job import Job, Phase
from .membership import WorkerPool


class Patience:
    """Of one queue.

    Args:
        wait_s: how long a request waits while nobody can serve it.
        end: ends a request.
    """

    def __init__(
        self,
        pool: WorkerPool,
        queue: FairQueue[Job],
        *,
        wait_s: float,
        end: Callable[[Job, SplitserveError], None],
    ) -> None:
        self._pool = pool
        self._queue = queue
        self._wait_s = wait_s
        self._end = end
        self._ready_weights: frozenset[str] = frozenset()
        self._stranded: dict[Job, asyncio.TimerHandle] = {}  # begun by weights that no ready worker has: others pass
        self._unusable_since = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None

    def in_order(self) -> Iterator[Job]:
        """Of the queue, those that somebody may serve."""
        if not self._stranded:
            return self._queue.in_order()
        return (job for job in self._queue.in_order() if job not in self._stranded)

    def workers_changed(self) -> None:
        """See who is there now."""
        was_usable = self._pool.usable
        self._pool.refresh()
        if was_usable and not self._pool.usable:
            self._unusable_since = time.monotonic()
        if self._ready_weights != self._pool.ready_weights:
            self._ready_weights = self._pool.ready_weights
            self.queued(list(self._queue))

    def queued(self, jobs: Iterable[Job]) -> None:
        """Give those that nobody can go on with `wait_s`: others' tokens would not be theirs."""
        for job in jobs:
            if not job.weights or job.weights in self._pool.ready_weights:
                self.left(job)
            elif job not in self._stranded:
                loop = asyncio.get_running_loop()
                self._stranded[job] = loop.call_later(self._wait_s, self._give_up_stranded, job)

    def left(self, job: Job) -> None:
        """It is queued no more, or somebody can go on with it."""
        if (timer := self._stranded.pop(job, None)) is not None:
            timer.cancel()

    def watch(self) -> None:
        """While nobody can serve, each queued request has `wait_s`, then it is told."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._pool.usable or not self._queue:
            return
        oldest = min(job.queued_at for job in self._queue)
        wait_s = max(oldest, self._unusable_since) + self._wait_s - time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._give_up)

    def _give_up(self) -> None:
        self._timer = None
        latest = time.monotonic() - self._wait_s + 0.001  # timers may fire that early
        for job in list(self._queue):
            if max(job.queued_at, self._unusable_since) <= latest:
                self._end(
                    job,
                    Unavailable(
                        f"no pair of prefill and decode worker was ready within {self._wait_s:g} s; "
                        "try again, or see the router's status for why",
                        retry_after_s=1.0,
                    ),
                )
        self.watch()

    def _give_up_stranded(self, job: Job) -> None:
        if job in self._stranded and job.phase is Phase.QUEUED:
            gone = f"no worker is ready that has the weights which began this answer ({job.weights})"
            self._end(job, Unavailable(f"{gone}; send the request again", retry_after_s=1.0))
