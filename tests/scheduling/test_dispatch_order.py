"""In which order requests go out, while some of them wait for one worker."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from splitserve.scheduling.dispatch_order import MAX_HELD, DispatchOrder
from splitserve.scheduling.routing import ClusterView, Placement, RoutedRequest, Snapshot

from .snapshots import decode, prefill


@dataclass
class Cluster:
    """Two prefill workers, a queue of requests that name the one they want ("" for nobody), and what was started."""

    queue: deque[str]
    closed: set[str] = field(default_factory=set)
    over: set[str] = field(default_factory=set)
    refuses: set[str] = field(default_factory=set)
    started: list[tuple[str, str]] = field(default_factory=list)
    held_when_asked: list[dict[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.order: DispatchOrder[str] = DispatchOrder(self.choose, self)

    def choose(self, snapshot: Snapshot) -> Placement | None:
        self.held_when_asked.append(dict(snapshot.held_tokens))
        wanted = snapshot.request.session.decode()
        return Placement(prefill=wanted, decode="d") if wanted else None

    def first(self) -> str | None:
        return self.queue[0] if self.queue else None

    def take(self) -> None:
        self.queue.popleft()

    def is_over(self, job: str) -> bool:
        return job in self.over

    def view(self) -> ClusterView:
        return ClusterView(
            prefills=[prefill(name, 10_000 if name in self.closed else 0) for name in "ab"],
            decodes=[decode("d")],
            any_prefill_alive=True,
            prefill_bound_s=0.2,
        )

    def snapshot(self, job: str, view: ClusterView, held_tokens: Mapping[str, int]) -> Snapshot:
        wanted = job.rstrip("0123456789").encode()
        return Snapshot(request=RoutedRequest(num_tokens=100, session=wanted), view=view, held_tokens=dict(held_tokens))

    def start(self, job: str, placement: Placement) -> bool:
        if job in self.refuses:
            self.refuses.remove(job)
            return False
        assert placement.prefill is not None
        self.started.append((job, placement.prefill))
        return True


def test_who_waits_for_a_busy_worker_lets_others_pass_but_nobody_who_wants_the_same() -> None:
    cluster = Cluster(deque(["a1", "a2", "b1", "b2"]), closed={"a"})
    cluster.order.run()
    assert cluster.started == [("b1", "b"), ("b2", "b")]
    assert cluster.order.held == ["a1", "a2"]
    assert cluster.held_when_asked[:3] == [{}, {"a": 100}, {"a": 200}]
    cluster.queue.append("a3")
    cluster.closed.clear()
    cluster.order.run()
    assert cluster.started[2:] == [("a1", "a"), ("a2", "a"), ("a3", "a")]


def test_nobody_passes_a_request_that_nobody_can_take() -> None:
    cluster = Cluster(deque(["1", "b1"]))
    cluster.order.run()
    assert cluster.started == []
    assert list(cluster.queue) == ["1", "b1"]


def test_a_refused_request_keeps_its_place_and_is_asked_for_again() -> None:
    cluster = Cluster(deque(["a1", "a2"]), refuses={"a1"})
    cluster.order.run()
    assert cluster.started == [("a1", "a"), ("a2", "a")]
    assert cluster.order.held == []


def test_requests_that_ended_while_they_waited_are_dropped() -> None:
    cluster = Cluster(deque(["a1", "b1", "a2"]), closed={"a"}, over={"b1"})
    cluster.order.run()
    cluster.over.add("a1")
    cluster.closed.clear()
    cluster.order.run()
    assert cluster.started == [("a2", "a")]


def test_a_cluster_without_an_open_worker_is_not_asked_about() -> None:
    cluster = Cluster(deque(["a1"]), closed={"a", "b"})
    cluster.order.run()
    assert cluster.held_when_asked == []
    assert list(cluster.queue) == ["a1"]


def test_no_more_than_a_bounded_number_is_held_back() -> None:
    cluster = Cluster(deque(f"a{i}" for i in range(2 * MAX_HELD)), closed={"a"})
    cluster.order.run()
    assert len(cluster.order.held) == MAX_HELD
    assert cluster.queue[0] == f"a{MAX_HELD}"
