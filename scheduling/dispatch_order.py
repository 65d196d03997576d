"""In which order queued requests go out: the queue's own, except that nobody waits for a worker that another wants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Protocol, TypeVar

from .routing import ClusterView, Placement, RoutingPolicy, Snapshot

J = TypeVar("J")

MAX_LOOKED_AT = 256  # requests from the head of the queue that one turn looks at


class Source(Protocol[J]):
    """The queue, and the cluster behind it."""

    @property
    def num_queued(self) -> int: ...

    def in_order(self) -> Iterator[J]:
        """The queued requests as they are to be served. Read no further after `start`."""
        ...

    def view(self) -> ClusterView:
        """The cluster as it is now."""
        ...

    def snapshot(self, job: J, view: ClusterView, held_tokens: Mapping[str, int]) -> Snapshot:
        """That, for this request."""
        ...

    def start(self, job: J, placement: Placement) -> None:
        """Take the request out of the queue and begin there, or note that the worker refused it."""
        ...


def dispatch(policy: RoutingPolicy, source: Source[J]) -> None:
    """Send off what can be, for the router and its simulation.

    A policy may want a prefill worker that has all the work it may have. Then the request stays queued, those behind it
    may pass to other workers, and nobody passes it at its own. It is bound to nothing: the next call looks at it again.
    """
    while source.num_queued and (view := source.view()).can_start_any and _start_one(policy, source, view):
        pass


def _start_one(policy: RoutingPolicy, source: Source[J], view: ClusterView) -> bool:
    """Start the first request that has an open worker; False: there is none."""
    held_tokens: dict[str, int] = {}  # of requests before the one looked at, by the worker that they wait for
    for job in islice(source.in_order(), MAX_LOOKED_AT):
        snapshot = source.snapshot(job, view, held_tokens)
        placement = policy(snapshot)
        if placement is None:
            return False
        wanted = next((load for load in view.prefills if load.worker == placement.prefill), None)
        if wanted is None or wanted.is_open(view.prefill_bound_s):
            source.start(job, placement)
            return True
        held_tokens[wanted.worker] = held_tokens.get(wanted.worker, 0) + snapshot.uncached_tokens(wanted.worker)
    return False
