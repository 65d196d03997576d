"""In which order requests go out, while some of them wait for one worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from splitserve.scheduling.dispatch_order import MAX_LOOKED_AT, dispatch
from splitserve.scheduling.routing import ClusterView, Placement, RoutedRequest, Snapshot

from .snapshots import decode, prefill


@dataclass
class Cluster:
    """Two prefill workers and a queue of requests that each name the one they want ("1" wants what nobody has)."""

    queue: list[str]
    closed: set[str] = field(default_factory=set)
    refuse: set[str] = field(default_factory=set)  # workers that do, once
    full: set[str] = field(default_factory=set)
    started: list[str] = field(default_factory=list)
    seen: list[tuple[str, dict[str, int]]] = field(default_factory=list)  # by the policy: request, tokens held

    def run(self) -> None:
        dispatch(self.choose, self)

    def choose(self, snapshot: Snapshot) -> Placement | None:
        job = snapshot.request.session.decode()
        self.seen.append((job, dict(snapshot.held_tokens)))
        names = [load.worker for load in snapshot.view.prefills]
        wanted = job[0] if job[0] in names else names[0] if names and job[0] in self.full else None
        return Placement(prefill=wanted, decode="d") if wanted else None

    @property
    def num_queued(self) -> int:
        return len(self.queue)

    def in_order(self) -> Iterator[str]:
        return iter(self.queue)

    def view(self) -> ClusterView:
        return ClusterView(
            prefills=[prefill(name, 10_000 if name in self.closed else 0) for name in "ab" if name not in self.full],
            decodes=[decode("d")],
            any_prefill_alive=True,
            prefill_bound_s=0.2,
        )

    def snapshot(self, job: str, view: ClusterView, held_tokens: Mapping[str, int]) -> Snapshot:
        return Snapshot(
            request=RoutedRequest(num_tokens=100, session=job.encode()), view=view, held_tokens=dict(held_tokens)
        )

    def start(self, job: str, placement: Placement) -> None:
        assert placement.prefill is not None
        if placement.prefill in self.refuse:
            self.full.add(placement.prefill)
            return
        self.queue.remove(job)
        self.started.append(f"{job} at {placement.prefill}")


def test_who_waits_for_a_busy_worker_lets_others_pass_but_nobody_who_wants_the_same() -> None:
    cluster = Cluster(["a1", "a2", "b1", "b2"], closed={"a"})
    cluster.run()
    assert cluster.started == ["b1 at b", "b2 at b"]
    assert cluster.queue == ["a1", "a2"]
    assert cluster.seen[:3] == [("a1", {}), ("a2", {"a": 100}), ("b1", {"a": 200})]
    cluster.queue.append("a3")
    cluster.closed.clear()
    cluster.run()
    assert cluster.started[2:] == ["a1 at a", "a2 at a", "a3 at a"]


def test_nobody_passes_a_request_that_nobody_can_take() -> None:
    cluster = Cluster(["1", "b1"])
    cluster.run()
    assert cluster.started == []
    assert cluster.queue == ["1", "b1"]


def test_a_refused_request_is_looked_at_again_at_once() -> None:
    cluster = Cluster(["a1", "b1"], refuse={"a"})
    cluster.run()
    assert cluster.started == ["a1 at b", "b1 at b"]


def test_a_cluster_without_an_open_worker_is_not_asked_about() -> None:
    cluster = Cluster(["a1"], closed={"a", "b"})
    cluster.run()
    assert cluster.seen == []
    assert cluster.queue == ["a1"]


def test_no_more_than_a_bounded_part_of_the_queue_is_looked_at() -> None:
    waiting = [f"a{i}" for i in range(MAX_LOOKED_AT)]
    cluster = Cluster([*waiting, "b1"], closed={"a"})
    cluster.run()
    assert cluster.started == []
    assert len(cluster.seen) == MAX_LOOKED_AT
