"""Requests are placed within one group of workers, on the group that can start them first, and stay with their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
from splitserve.scheduling.pairing import Group, groups_of, one_group
from splitserve.scheduling.policies.registry import POLICIES, load_policy
from splitserve.scheduling.routing import ClusterView, DecodeLoad, PrefillLoad, RoutedRequest, Snapshot
from splitserve.scheduling.step_times import MeasuredTimes

OLD, NEW = Group(weights="old", protocol=1), Group(weights="new", protocol=1)
NEWER = Group(weights="new", protocol=2)


def prefill(worker: str, group: Group, outstanding: int = 0) -> PrefillLoad:
    prompts = 9 if outstanding else 0
    return PrefillLoad(
        worker=worker, outstanding_tokens=outstanding, outstanding_prompts=prompts, tokens_per_s=100.0, group=group
    )


def decode(worker: str, group: Group, blocks: int = 100) -> DecodeLoad:
    return DecodeLoad(worker=worker, available_blocks=blocks, num_sequences=0, group=group)


def colocated(worker: str, waiting: int, *, speed: float = 100.0) -> DecodeLoad:
    """Of the new version, with so many prompt tokens to compute."""
    times = MeasuredTimes(prefill_tokens_per_s=speed, decode_step_time_s=0.0)
    load = decode(worker, NEW, 1000)
    return replace(load, colocated=True, local_prefill_tokens=waiting, times=times)


def view(prefills: list[PrefillLoad], decodes: list[DecodeLoad]) -> ClusterView:
    return ClusterView(
        prefills=prefills,
        decodes=decodes,
        groups=groups_of(prefills, decodes),
        alive_groups=frozenset(load.group for load in prefills if load.group is not None),
        any_prefill_alive=bool(prefills),
        prefill_bound_s=0.2,
    )


def workers(part: ClusterView) -> set[str]:
    return {load.worker for load in (*part.prefills, *part.decodes)}


def test_a_cluster_of_one_group_is_taken_whole() -> None:
    whole = view([prefill("p", OLD)], [decode("d", OLD)])
    assert one_group(whole) is whole
    assert one_group(whole, "old") is whole


@pytest.mark.parametrize("other", [NEW, NEWER], ids=["weights", "protocol"])
def test_the_group_where_the_prefill_starts_first_is_taken_and_no_worker_of_another(other: Group) -> None:
    old_p, old_d = prefill("old-p", OLD, outstanding=15), decode("old-d", OLD, 1000)
    both = view([old_p, prefill("new-p", other)], [old_d, decode("new-d", other, 10)])
    assert workers(one_group(both)) == {"new-p", "new-d"}


def test_a_request_stays_with_the_weights_that_began_it() -> None:
    both = view([prefill("old-p", OLD, 15), prefill("new-p", NEW)], [decode("old-d", OLD), decode("new-d", NEW)])
    assert workers(one_group(both, "old")) == {"old-p", "old-d"}
    assert workers(one_group(both, "elsewhere")) == set()
    assert workers(one_group(view([prefill("p", OLD)], [decode("d", OLD)]), "new")) == set()


def test_half_a_group_serves_nobody() -> None:
    both = view([prefill("old-p", OLD, 15), prefill("new-p", NEW)], [decode("old-d", OLD)])
    assert workers(one_group(both)) == {"old-p", "old-d"}


@pytest.mark.parametrize(
    ("waiting", "taken"),
    [
        ([colocated("c", 20)], "old"),
        ([colocated("c", 10)], "new"),
        ([colocated("c", 20), colocated("d", 0)], "new"),
        ([colocated("c", 20, speed=200.0)], "new"),
        ([colocated("c", 40, speed=200.0), colocated("d", 25, speed=0.0)], "new"),  # unknown: as fast as the other
        ([colocated("c", 40, speed=200.0), colocated("d", 35, speed=0.0)], "old"),
        ([colocated("c", 160, speed=0.0)], "old"),  # a guess
        ([colocated("c", 140, speed=0.0)], "new"),
        ([replace(colocated("c", 160), times=None)], "old"),
    ],
)
def test_colocated_workers_count_by_the_prompts_that_wait_there(waiting: list[DecodeLoad], taken: str) -> None:
    old_p = prefill("old-p", OLD, outstanding=15)
    both = view([old_p], [decode("old-d", OLD), *waiting])
    assert one_group(both).groups == (OLD if taken == "old" else NEW,)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_no_policy_pairs_workers_of_two_groups(name: str) -> None:
    prefills = [prefill(f"{group.weights}-p{i}", group, 5 * i) for group in (OLD, NEW) for i in range(3)]
    decodes = [decode(f"{group.weights}-d{i}", group, 50 + 7 * i) for group in (OLD, NEW) for i in range(3)]
    policy = load_policy(name)
    for turn in range(50):
        request = RoutedRequest(num_tokens=100, turn=turn, draw=turn * 7919, session=str(turn % 5).encode())
        placement = policy(Snapshot(request=request, view=one_group(view(prefills, decodes))))
        assert placement is not None
        assert placement.prefill is not None
        assert placement.prefill.split("-")[0] == placement.decode.split("-")[0]
