"""What the router tells its routing policy: loads of the workers that take work, and one request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ..core.request import Request
from ..scheduling.fair_queue import Ticket
from ..scheduling.pairing import groups_of, one_group
from ..scheduling.routing import ClusterView, RoutedRequest, Snapshot
from .membership import WorkerPool


class RoutedJob(Protocol):
    """The dispatcher's request, as far as routing needs it."""

    request: Request
    ticket: Ticket
    draw: int
    avoid: set[str]

    @property
    def weights(self) -> str:
        """What computed the tokens that its client has; "" while it has none of ours."""
        ...


class RoutingView:
    """Makes snapshots of one router's workers."""

    def __init__(self, pool: WorkerPool, *, prefill_bound_s: float) -> None:
        self._pool = pool
        self._prefill_bound_s = prefill_bound_s

    def view(self) -> ClusterView:
        pool = self._pool
        prefills = [link.load for link in pool.prefills.values() if link.takes_work]
        decodes = [link.load for link in pool.decodes.values() if link.takes_work]
        groups = groups_of(prefills, decodes)
        alive = {link.group for link in pool.prefills.values() if link.state == "ready"} if len(groups) > 1 else ()
        return ClusterView(
            prefills=prefills,
            decodes=decodes,
            groups=groups,
            alive_groups=frozenset(group for group in alive if group is not None),
            any_prefill_alive=pool.any_prefill_alive,
            prefill_bound_s=self._prefill_bound_s,
            kv_bytes_per_token=pool.kv_bytes_per_token,
        )

    def snapshot(self, job: RoutedJob, view: ClusterView, held_tokens: Mapping[str, int]) -> Snapshot:
        return Snapshot(
            request=RoutedRequest(num_tokens=job.request.num_tokens, turn=job.ticket.order, draw=job.draw),
            view=one_group(view, job.weights),
            held_tokens=held_tokens,
            avoid=job.avoid,
        )
