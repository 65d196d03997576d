"""In which order queued requests go out: the queue's own, except that nobody waits for a worker that another wants."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Generic, Protocol, TypeVar

from .routing import ClusterView, Placement, RoutingPolicy, Snapshot

J = TypeVar("J")


class Turn(Enum):
    """What follows on looking at one request."""

    ON = "the next one's turn"
    AGAIN = "it was refused, which changes what the others see"
    STOP = "nobody can take it, and nobody passes it"
    DONE = "it waits for a worker, and so would everybody else"


MAX_HELD = 256  # requests out of the queue that wait for one worker each; they are looked at again at every turn


class Source(Protocol[J]):
    """The queue, and the cluster behind it."""

    def first(self) -> J | None:
        """Who is next in the queue."""
        ...

    def take(self) -> None:
        """That one leaves it."""
        ...

    def is_over(self, job: J) -> bool:
        """Whether the request ended while it waited."""
        ...

    def view(self) -> ClusterView:
        """The cluster as it is now."""
        ...

    def snapshot(self, job: J, view: ClusterView, held_tokens: Mapping[str, int]) -> Snapshot:
        """That, for this request."""
        ...

    def start(self, job: J, placement: Placement) -> bool:
        """Begin there. False: it was refused; the request waits on in its place."""
        ...


class DispatchOrder(Generic[J]):
    """Runs a policy over the queue, for the router and its simulation.

    A policy may want a prefill worker that has all the work it may have. Then the request waits for it here, those
    behind it may pass to other workers, and nobody passes it at its own. It is bound to nothing: as long as it waits it
    is looked at again, first come first served.
    """

    def __init__(self, policy: RoutingPolicy, source: Source[J]) -> None:
        self._policy = policy
        self._source = source
        self._running = False
        self._view: ClusterView | None = None  # None: it has changed
        self.held: list[J] = []  # in order

    def run(self) -> None:
        """Dispatch until nothing more can go out."""
        if self._running:  # starting one request ended another; the loop below comes to that
            return
        self._running = True
        try:
            while self._round():
                pass
        finally:
            self._running = False

    def _round(self) -> bool:
        """Look once at each held request and at the queue behind them; whether to do so again."""
        source, held_tokens = self._source, dict[str, int]()
        self._view = source.view()
        if not self._view.can_start_any:
            return False
        waiting, self.held = self.held, []
        for index, job in enumerate(waiting):
            if source.is_over(job):
                continue
            turn = self._turn(job, held_tokens)
            if turn is not Turn.ON:
                if turn is Turn.STOP:
                    self.held.append(job)
                self.held += waiting[index + 1 :]
                return turn is Turn.AGAIN
        while len(self.held) < MAX_HELD and (job_or_none := source.first()) is not None:
            if source.is_over(job_or_none):
                source.take()
                continue
            turn = self._turn(job_or_none, held_tokens, queued=True)
            if turn is not Turn.ON:
                return turn is Turn.AGAIN
        return False

    def _turn(self, job: J, held_tokens: dict[str, int], *, queued: bool = False) -> Turn:
        """Start the request, hold it, or leave it where it is (STOP)."""
        if self._view is None:
            self._view = self._source.view()
        snapshot = self._source.snapshot(job, self._view, held_tokens)
        placement = self._policy(snapshot)
        if placement is None:
            return Turn.STOP
        if queued:
            self._source.take()
        wanted = next((load for load in snapshot.view.prefills if load.worker == placement.prefill), None)
        if wanted is None or wanted.is_open(snapshot.view.prefill_bound_s):
            self._view = None
            if self._source.start(job, placement):
                return Turn.ON
            self.held.append(job)
            return Turn.AGAIN
        self.held.append(job)
        held_tokens[wanted.worker] = held_tokens.get(wanted.worker, 0) + snapshot.uncached_tokens(wanted.worker)
        return Turn.ON if snapshot.view.can_start_any else Turn.DONE
