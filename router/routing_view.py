"""What the router tells its routing policy: loads of the workers that take work, and one request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ..core.request import Request
from ..scheduling.fair_queue import Ticket
from ..scheduling.routing import ClusterView, RoutedRequest, Snapshot
from .membership import WorkerPool


class RoutedJob(Protocol):
    """The dispatcher's request, as far as routing needs it."""

    request: Request
    ticket: Ticket
    draw: int
    avoid: set[str]


class RoutingView:
    """Makes snapshots of one router's workers."""

    def __init__(self, pool: WorkerPool, *, prefill_bound_s: float) -> None:
        self._pool = pool
        self._prefill_bound_s = prefill_bound_s

    def view(self) -> ClusterView:
        pool = self._pool
        return ClusterView(
            prefills=[link.load for link in pool.prefills.values() if link.takes_work],
            decodes=[link.load for link in pool.decodes.values() if link.takes_work],
            any_prefill_alive=pool.any_prefill_alive,
            prefill_bound_s=self._prefill_bound_s,
            kv_bytes_per_token=pool.kv_bytes_per_token,
        )

    def snapshot(self, job: RoutedJob, view: ClusterView, held_tokens: Mapping[str, int]) -> Snapshot:
        return Snapshot(
            request=RoutedRequest(num_tokens=job.request.num_tokens, turn=job.ticket.order, draw=job.draw),
            view=view,
            held_tokens=held_tokens,
            avoid=job.avoid,
        )
