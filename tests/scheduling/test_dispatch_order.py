"""In which order requests go out, while some of them wait for one worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import InitVar, dataclass, field, replace

import pytest
from splitserve.scheduling.dispatch_order import MAX_LOOKED_AT, RECONSIDER_S, Awaited, dispatch
from splitserve.scheduling.pairing import Group, groups_of, one_group
from splitserve.scheduling.policies.registry import POLICIES
from splitserve.scheduling.ranked_loads import DecodeLoads, PrefillLoads
from splitserve.scheduling.routing import ClusterView, Placement, RoutedRequest, RoutingPolicy, Snapshot

from .snapshots import decode, prefill

OLD, NEW = Group(weights="old", protocol=1), Group(weights="new", protocol=1)


@dataclass
class Job:
    name: str
    weights: str = ""
    awaits: Awaited | None = None


@dataclass
class Cluster:
    """Two prefill workers and a queue of requests that each name the one they want ("1" wants what nobody has)."""

    names: InitVar[list[str]]
    closed: set[str] = field(default_factory=set)
    refuse: set[str] = field(default_factory=set)  # workers that do, once
    full: set[str] = field(default_factory=set)
    started: list[str] = field(default_factory=list)
    seen: list[tuple[str, dict[str, int]]] = field(default_factory=list)  # by the policy: request, tokens held

    now_s: float = 0.0
    closes: bool = False  # a worker has room for one
    ranked: bool = True  # else the view holds plain lists

    def __post_init__(self, names: list[str]) -> None:
        self.jobs = [Job(name) for name in names]
        self.prefills, self.decodes = PrefillLoads(0.2), DecodeLoads()
        self.decodes.put("d", decode("d"))

    @property
    def queue(self) -> list[str]:
        return [job.name for job in self.jobs]

    def join(self, name: str) -> None:
        self.jobs.append(Job(name))

    def run(self) -> list[str]:
        """Dispatch; whom the policy looked at."""
        before = len(self.seen)
        dispatch(self.choose, self, self.now_s)
        return [name for name, _ in self.seen[before:]]

    def choose(self, snapshot: Snapshot) -> Placement | None:
        job = snapshot.request.session.decode()
        self.seen.append((job, dict(snapshot.held_tokens)))
        names = [load.worker for load in snapshot.view.prefills]
        wanted = job[0] if job[0] in names else names[0] if names and job[0] in self.full else None
        return Placement(prefill=wanted, decode="d") if wanted else None

    @property
    def num_queued(self) -> int:
        return len(self.jobs)

    def in_order(self) -> Iterator[Job]:
        return iter(self.jobs)

    def view(self) -> ClusterView:
        for name in "ab":
            load = prefill(name, 10_000 if name in self.closed else 0)
            self.prefills.put(name, load if name not in self.full else None)
        return ClusterView(
            prefills=self.prefills if self.ranked else list(self.prefills),
            decodes=self.decodes if self.ranked else list(self.decodes),
            any_prefill_alive=True,
            prefill_bound_s=0.2,
        )

    def snapshot(self, job: Job, view: ClusterView, held_tokens: Mapping[str, int]) -> Snapshot:
        return Snapshot(
            request=RoutedRequest(num_tokens=100, session=job.name.encode()), view=view, held_tokens=dict(held_tokens)
        )

    def start(self, job: Job, placement: Placement) -> None:
        assert placement.prefill is not None
        if placement.prefill in self.refuse:
            self.full.add(placement.prefill)
            return
        self.jobs.remove(job)
        self.started.append(f"{job.name} at {placement.prefill}")
        if self.closes:
            self.closed.add(placement.prefill)


def test_who_waits_for_a_busy_worker_lets_others_pass_but_nobody_who_wants_the_same() -> None:
    cluster = Cluster(["a1", "a2", "b1", "b2"], closed={"a"})
    cluster.run()
    assert cluster.started == ["b1 at b", "b2 at b"]
    assert cluster.queue == ["a1", "a2"]
    assert cluster.seen[:3] == [("a1", {}), ("a2", {"a": 100}), ("b1", {"a": 200})]
    cluster.join("a3")
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


def test_who_waits_is_looked_at_again_once_a_worker_got_better_or_some_time_has_passed() -> None:
    cluster = Cluster(["a1", "a2"], closed={"a"})
    assert cluster.run() == ["a1", "a2"]
    assert cluster.run() == []
    cluster.join("a3")
    assert cluster.run() == ["a3"]
    assert cluster.seen[-1] == ("a3", {"a": 200})  # those before it count, looked at or not
    cluster.join("b1")
    assert cluster.run() == ["b1"]
    assert cluster.started == ["b1 at b"]
    cluster.closed.add("b")
    assert cluster.run() == []
    cluster.closed.remove("b")
    assert cluster.run() == ["a1", "a2", "a3"]
    cluster.now_s += RECONSIDER_S
    assert cluster.run() == ["a1", "a2", "a3"]
    cluster.full.add("a")  # who waited for it goes elsewhere
    cluster.run()
    assert cluster.started == ["b1 at b", "a1 at b", "a2 at b", "a3 at b"]


def test_a_worker_with_room_for_one_costs_one_look_however_many_wait() -> None:
    cluster = Cluster([f"a{i}" for i in range(100)], closed={"a", "b"}, closes=True)
    assert cluster.run() == []
    cluster.closed.remove("a")
    assert cluster.run() == ["a0"]


def test_with_plain_lists_everybody_is_looked_at_each_time() -> None:
    cluster = Cluster(["a1", "a2"], closed={"a"}, ranked=False)
    assert cluster.run() == cluster.run() == ["a1", "a2"]


class Upgrade:
    """A prefill and a decode worker of each of two versions, and a queue of requests: "old..." is bound to that one."""

    def __init__(self, policy: RoutingPolicy, names: list[str]) -> None:
        self.policy = policy
        self.jobs = [Job(name, weights="old" if name.startswith("old") else "") for name in names]
        self.prefills, self.decodes = PrefillLoads(0.2), DecodeLoads()
        self.started: list[str] = []
        self.looks = 0
        self.colocated: set[Group] = set()  # its decode worker is, and there is no prefill worker
        for group in (OLD, NEW):
            self.prefills.put(f"{group.weights}-p", replace(prefill(f"{group.weights}-p"), group=group))
            self.full(group, False)

    def full(self, group: Group, full: bool = True) -> None:
        name = f"{group.weights}-d"
        load = decode(name, colocated=group in self.colocated)
        self.decodes.put(name, replace(load, group=group) if not full else None)

    def colocate(self, group: Group) -> None:
        self.colocated.add(group)
        self.prefills.put(f"{group.weights}-p", None)
        self.full(group, False)

    def close(self, group: Group) -> None:
        name = f"{group.weights}-p"
        self.prefills.put(name, replace(prefill(name, 10_000), group=group))

    def run(self) -> list[str]:
        """Dispatch; who was started where."""
        before = len(self.started)
        dispatch(self.policy, self, 0.0)
        return self.started[before:]

    @property
    def num_queued(self) -> int:
        return len(self.jobs)

    def in_order(self) -> Iterator[Job]:
        return iter(self.jobs)

    def view(self) -> ClusterView:
        groups = groups_of(self.prefills, self.decodes)
        return ClusterView(
            prefills=self.prefills,
            decodes=self.decodes,
            groups=groups,
            alive_groups=frozenset({OLD, NEW} - self.colocated),
            any_prefill_alive=True,
            prefill_bound_s=0.2,
        )

    def snapshot(self, job: Job, view: ClusterView, held_tokens: Mapping[str, int]) -> Snapshot:
        self.looks += 1
        request = RoutedRequest(num_tokens=100, session=job.name.encode())
        return Snapshot(request=request, view=one_group(view, job.weights), held_tokens=held_tokens)

    def start(self, job: Job, placement: Placement) -> None:
        self.jobs.remove(job)
        self.started.append(f"{job.name} at {placement.decode}")


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_who_is_bound_to_a_version_without_room_is_passed_by_those_that_another_takes(name: str) -> None:
    upgrade = Upgrade(POLICIES[name], ["old1", "old2", "x", "y"])
    upgrade.full(OLD)
    assert upgrade.run() == ["x at new-d", "y at new-d"]
    upgrade.jobs.append(Job("z"))
    upgrade.full(OLD, False)
    assert upgrade.run()[:2] == ["old1 at old-d", "old2 at old-d"]
    assert not upgrade.jobs


def test_who_is_bound_to_a_version_is_passed_by_nobody_there() -> None:
    def not_the_first(snapshot: Snapshot) -> Placement | None:
        """Wants more room for one request than for the others."""
        if snapshot.request.session == b"old1":
            return None
        (prefill,), (decode,) = snapshot.view.prefills, snapshot.view.decodes
        return Placement(prefill=prefill.worker, decode=decode.worker)

    upgrade = Upgrade(not_the_first, ["old1", "old2", "x"])
    upgrade.prefills.put("new-p", None)
    assert upgrade.run() == []
    upgrade.decodes.put("new-d", None)  # and one version alone
    assert upgrade.run() == []


def test_many_that_are_bound_to_a_version_without_room_cost_one_look() -> None:
    upgrade = Upgrade(POLICIES["prefix"], [f"old{i}" for i in range(100)])
    upgrade.full(OLD)
    assert upgrade.run() == []
    assert upgrade.looks == 1


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_version_of_colocated_workers_serves_while_the_prefill_worker_of_the_other_is_busy(name: str) -> None:
    upgrade = Upgrade(POLICIES[name], ["old1", "x", "y"])
    upgrade.colocate(NEW)
    upgrade.close(OLD)
    assert upgrade.run() == ["x at new-d", "y at new-d"]


def test_who_waits_for_a_prefill_worker_is_looked_at_once_a_colocated_one_of_another_version_has_room() -> None:
    def first_or_alone(snapshot: Snapshot) -> Placement:
        view = snapshot.view
        return Placement(prefill="old-p" if view.prefills else None, decode=view.decodes[0].worker)

    upgrade = Upgrade(first_or_alone, ["x"])
    upgrade.colocate(NEW)
    upgrade.full(NEW)
    upgrade.close(OLD)
    upgrade.prefills.put("old-q", replace(prefill("old-q"), group=OLD))
    assert upgrade.run() == []
    assert upgrade.jobs[0].awaits is not None
    upgrade.prefills.put("old-q", None)
    upgrade.full(NEW, False)
    assert upgrade.run() == ["x at new-d"]
