"""In which order queued requests go out: the queue's own, except that nobody waits for a worker that another wants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

from .ranked_loads import DecodeLoads, PrefillLoads
from .routing import ClusterView, Placement, PrefillLoad, RoutingPolicy, Snapshot

MAX_LOOKED_AT = 256  # requests from the head of the queue that one turn looks at
RECONSIDER_S = 0.1  # after which a policy looks again at who waits for a worker, although none that is open got better


@dataclass(frozen=True, slots=True)
class Awaited:
    """The busy worker that a queued request was found to wait for."""

    worker: str
    num_tokens: int  # of its prompt, that the worker would compute
    improvements: tuple[int, int]  # of prefill and of decode workers, that were taken into account
    until_s: float  # when it is looked at again in any case


class QueuedJob(Protocol):
    """A queued request. It leaves the queue, and comes into it, with `awaits` None."""

    awaits: Awaited | None

    @property
    def weights(self) -> str:
        """Of the workers that alone may go on with it; "": any may."""
        ...


J = TypeVar("J", bound=QueuedJob)


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


def dispatch(policy: RoutingPolicy, source: Source[J], now_s: float) -> None:
    """Send off what can be, for the router and its simulation.

    A policy may want a prefill worker that has all the work it may have. Then the request stays queued, those behind it
    may pass to other workers, and nobody passes it at its own. It is bound to nothing, but it is not looked at again
    before some open worker has got better, or `RECONSIDER_S` have passed: else each prompt that ends somewhere would
    have the whole queue looked through.

    A policy may find nobody. Then nobody passes the request, unless it is bound to weights: those behind it may go to
    workers with others.
    """
    while source.num_queued and _can_start_any(view := source.view()) and _start_one(policy, source, view, now_s):
        pass


def _start_one(policy: RoutingPolicy, source: Source[J], view: ClusterView, now_s: float) -> bool:
    """Start the first request that has an open worker; False: there is none."""
    held_tokens: dict[str, int] = {}  # of requests before the one looked at, by the worker that they wait for
    unserved: set[str] = set()  # weights whose workers cannot take one that is before it and bound to them
    newest = _newest_improvements(view)
    for job in islice(source.in_order(), MAX_LOOKED_AT):
        awaited = job.awaits
        if awaited is None or newest is None or _is_stale(awaited, view, newest, now_s):
            job.awaits = None
            if job.weights in unserved:
                continue
            snapshot = source.snapshot(job, view, held_tokens)
            would_pass = any(group.weights in unserved for group in snapshot.view.groups)
            placement = policy(snapshot) if not would_pass else None
            if placement is None and job.weights:
                unserved.add(job.weights)
                continue
            if placement is None:
                return False
            wanted = _prefill(view, placement.prefill) if placement.prefill is not None else None
            if wanted is None or wanted.is_open(view.prefill_bound_s):
                source.start(job, placement)
                return True
            job.awaits = awaited = Awaited(
                worker=wanted.worker,
                num_tokens=snapshot.uncached_tokens(wanted.worker),
                improvements=newest or (0, 0),
                until_s=now_s + RECONSIDER_S,
            )
        held_tokens[awaited.worker] = held_tokens.get(awaited.worker, 0) + awaited.num_tokens
    return False


def _is_stale(awaited: Awaited, view: ClusterView, newest: tuple[int, int], now_s: float) -> bool:
    """Whether a policy might choose otherwise by now."""
    prefill, decode = awaited.improvements
    return (
        prefill < newest[0] or decode < newest[1] or awaited.until_s <= now_s or _prefill(view, awaited.worker) is None
    )


def _newest_improvements(view: ClusterView) -> tuple[int, int] | None:
    """Of prefill workers that are open, and of decode workers where they may take a request from those.

    None: nobody counts them, and every request has to be looked at.
    """
    if not (isinstance(view.prefills, PrefillLoads) and isinstance(view.decodes, DecodeLoads)):
        return None
    local = view.local_prefill_itl_s is not None or _has_group_without_prefill(view)
    return view.prefills.last_improvement, view.decodes.last_improvement if local else 0


def _can_start_any(view: ClusterView) -> bool:
    """Whether any request at all can be sent off now."""
    if view.local_prefill_itl_s is not None or not view.any_prefill_alive:
        return True
    if isinstance(view.prefills, PrefillLoads):
        any_open = view.prefills.any_open
    else:
        any_open = any(load.is_open(view.prefill_bound_s) for load in view.prefills)
    return any_open or _has_group_without_prefill(view)


def _has_group_without_prefill(view: ClusterView) -> bool:
    """Whether a colocated worker takes work that no prefill worker alive could do for it."""
    if len(view.groups) < 2:  # nobody looked who is alive in it
        return False
    return any(load.colocated and load.group not in view.alive_groups for load in view.decodes)


def _prefill(view: ClusterView, worker: str) -> PrefillLoad | None:
    if isinstance(view.prefills, PrefillLoads):
        return view.prefills.get(worker)
    return next((load for load in view.prefills if load.worker == worker), None)
