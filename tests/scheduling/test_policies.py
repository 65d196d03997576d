"""Which pair serves a request, by each policy."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from importlib import metadata
from importlib.metadata import EntryPoint, EntryPoints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from splitserve.core.errors import ConfigError
from splitserve.scheduling.links import Place
from splitserve.scheduling.policies.least_loaded import least_loaded
from splitserve.scheduling.policies.power_of_two import power_of_two
from splitserve.scheduling.policies.prefix import prefix
from splitserve.scheduling.policies.registry import POLICIES, load_policy
from splitserve.scheduling.policies.round_robin import round_robin
from splitserve.scheduling.policies.session import session
from splitserve.scheduling.routing import DecodeLoad, Placement, PrefillLoad, RoutingPolicy
from splitserve.scheduling.step_times import MeasuredTimes

from .snapshots import decode, prefill, snapshot

FAST = prefill("p-fast", 100, speed=10_000.0)
SLOW = prefill("p-slow", 90, speed=1_000.0)
ROOMY = decode("d-roomy", 600)
FULL = decode("d-full", 70, sequences=1)
BOTH = decode("c", 65, colocated=True)

every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
by_load = pytest.mark.parametrize("policy", [prefix, least_loaded], ids=["prefix", "least_loaded"])


# All of them.


@every_policy
def test_without_a_living_prefill_worker_a_colocated_one_does_everything(policy: RoutingPolicy) -> None:
    assert policy(snapshot([], [ROOMY, BOTH], alive=False)) == Placement(prefill=None, decode="c")
    assert policy(snapshot([], [ROOMY], alive=False)) is None


@every_policy
def test_busy_prefill_workers_are_not_dead_ones(policy: RoutingPolicy) -> None:
    assert policy(snapshot([], [ROOMY, BOTH], alive=True)) is None


@every_policy
@pytest.mark.parametrize("draw", [0, 7 << 32 | 3])
def test_a_worker_that_failed_is_taken_only_without_another(policy: RoutingPolicy, draw: int) -> None:
    failed = {"p-fast", "d-roomy"}
    for name in (b"", b"a", b"b", b"c"):
        view = snapshot([FAST, SLOW], [ROOMY, FULL], avoid=failed, draw=draw, session=name)
        assert policy(view) == Placement(prefill="p-slow", decode="d-full")
        alone = snapshot([FAST], [ROOMY], avoid=failed, draw=draw, session=name)
        assert policy(alone) == Placement(prefill="p-fast", decode="d-roomy")


prefill_loads = st.lists(
    st.builds(
        PrefillLoad,
        worker=st.uuids().map(str),
        outstanding_tokens=st.integers(0, 5000),
        outstanding_prompts=st.integers(0, 4),
        tokens_per_s=st.floats(0, 1e5),
    ),
    max_size=6,
    unique_by=lambda load: load.worker,
)
decode_loads = st.lists(
    st.builds(
        DecodeLoad,
        worker=st.uuids().map(str),
        available_blocks=st.integers(-5, 1000),
        num_sequences=st.integers(0, 64),
        num_blocks=st.sampled_from([0, 1000]),
        colocated=st.booleans(),
        times=st.none() | st.builds(MeasuredTimes, prefill_tokens_per_s=st.just(1e4), decode_step_time_s=st.just(0.01)),
    ),
    max_size=6,
    unique_by=lambda load: load.worker,
)


@every_policy
@given(
    prefills=prefill_loads,
    decodes=decode_loads,
    alive=st.booleans(),
    turn=st.integers(0, 99),
    draw=st.integers(0, 2**64 - 1),
    name=st.binary(max_size=80),
)
def test_a_policy_answers_with_workers_of_the_snapshot_and_equal_ones_alike(
    policy: RoutingPolicy,
    prefills: list[PrefillLoad],
    decodes: list[DecodeLoad],
    alive: bool,
    turn: int,
    draw: int,
    name: bytes,
) -> None:
    view = snapshot(prefills, decodes, alive=alive, turn=turn, draw=draw, session=name)
    placed = policy(view)
    assert placed == policy(replace(view))
    if placed is not None:
        assert placed.decode in {load.worker for load in decodes}
        assert placed.prefill in {load.worker for load in prefills} if alive else placed.prefill is None


# By load.


@by_load
def test_the_shortest_wait_and_the_most_room_win(policy: RoutingPolicy) -> None:
    assert policy(snapshot([SLOW, FAST], [FULL, ROOMY])) == Placement(prefill="p-fast", decode="d-roomy")


@by_load
def test_equal_room_goes_to_fewer_sequences(policy: RoutingPolicy) -> None:
    busy = decode("d-busy", 600, sequences=10)
    assert policy(snapshot([FAST], [busy, ROOMY])) == Placement(prefill="p-fast", decode="d-roomy")


def test_least_loaded_waits_for_whoever_opens_first() -> None:
    assert least_loaded(snapshot([SLOW], [ROOMY], bound_s=0.08)) is None
    assert least_loaded(snapshot([SLOW], [ROOMY], bound_s=0.09)) == Placement(prefill="p-slow", decode="d-roomy")


def test_a_prompt_waits_behind_the_running_one_however_long_that_is() -> None:
    running = replace(SLOW, outstanding_tokens=8_192, outstanding_prompts=1)
    assert least_loaded(snapshot([running], [ROOMY])) == Placement(prefill="p-slow", decode="d-roomy")
    assert least_loaded(snapshot([replace(running, outstanding_prompts=2)], [ROOMY])) is None
    assert least_loaded(snapshot([running], [ROOMY], bound_s=0.0)) is None


def test_each_router_has_a_prompt_at_a_worker_that_others_keep_busy() -> None:
    busy = replace(SLOW, outstanding_tokens=8_192, outstanding_prompts=3)
    assert least_loaded(snapshot([replace(busy, own_prompts=1)], [ROOMY])) is not None
    assert least_loaded(snapshot([replace(busy, own_prompts=2)], [ROOMY])) is None
    assert least_loaded(snapshot([replace(busy, own_prompts=0)], [ROOMY], bound_s=0.0)) is None


@given(prefills=prefill_loads, bound_s=st.floats(0.01, 2.0))
def test_least_loaded_sends_nothing_past_the_bound_but_to_a_worker_about_to_run_dry(
    prefills: list[PrefillLoad], bound_s: float
) -> None:
    usable = {p.worker: p.wait_s for p in prefills if p.wait_s <= bound_s or p.outstanding_prompts < 2}
    placed = least_loaded(snapshot(prefills, [ROOMY], bound_s=bound_s))
    if placed is None:
        assert not usable
    else:
        assert placed.prefill is not None
        assert usable[placed.prefill] == min(usable.values())


def test_power_of_two_takes_the_less_loaded_of_two_and_reaches_everybody() -> None:
    workers = [prefill(f"p{i}", tokens=100 * i) for i in range(4)]
    decodes = [decode(f"d{i}", 100 * i + 100) for i in range(4)]
    chosen: Counter[str | None] = Counter()
    for draw in range(4 * 3):
        placed = power_of_two(snapshot(workers, decodes, draw=draw % 4 | (draw // 4) << 16 | draw << 32))
        assert placed is not None
        chosen[placed.prefill] += 1
    assert chosen == {"p0": 6, "p1": 4, "p2": 2}  # of each pair of four the lower one, so never the last


def test_round_robin_counts_round_whatever_the_load() -> None:
    workers = [prefill("p0", 10**6), prefill("p1")]
    decodes = [decode(f"d{i}") for i in range(3)]
    turns = [round_robin(snapshot(workers, decodes, turn=turn)) for turn in range(6)]
    assert turns == [Placement(prefill=f"p{turn % 2}", decode=f"d{turn % 3}") for turn in range(6)]


def test_a_conversation_stays_where_it_is_when_another_worker_leaves() -> None:
    workers = [prefill(f"p{i}", tokens=i) for i in range(5)]
    decodes = [decode(f"d{i}") for i in range(5)]
    names = [b"%d" % i for i in range(200)]
    before = {name: session(snapshot(workers, decodes, session=name)) for name in names}
    after = {name: session(snapshot(workers[1:], decodes, session=name)) for name in names}
    assert {placed.prefill for placed in before.values() if placed} == {load.worker for load in workers}
    for name, placed in before.items():
        if placed is not None and placed.prefill != "p0":
            assert after[name] == placed


def test_a_request_of_no_conversation_goes_where_the_load_is_least() -> None:
    assert session(snapshot([SLOW, FAST], [FULL, ROOMY])) == Placement(prefill="p-fast", decode="d-roomy")


# By prefix.


def test_the_worker_that_holds_the_prompt_is_worth_a_wait_as_long_as_the_work_it_saves() -> None:
    holder, idle = prefill("holder", 4_000), prefill("idle")  # 0.4 s of work
    for cached, wanted in ((9_000, "holder"), (1_000, "idle")):
        placed = prefix(snapshot([holder, idle], [ROOMY], num_tokens=9_600, cached={"holder": cached}))
        assert placed == Placement(prefill=wanted, decode="d-roomy")


def test_those_who_wait_for_the_same_worker_count_into_its_wait() -> None:
    holder, idle = prefill("holder", 1_000), prefill("idle")
    asked = {"num_tokens": 6_000, "cached": {"holder": 5_000}}
    assert prefix(snapshot([holder, idle], [ROOMY], **asked)) == Placement(prefill="holder", decode="d-roomy")
    crowded = snapshot([holder, idle], [ROOMY], held={"holder": 20_000}, **asked)
    assert prefix(crowded) == Placement(prefill="idle", decode="d-roomy")


def test_a_request_that_is_almost_late_takes_the_sooner_worker_and_not_the_thriftier() -> None:
    holder, idle = prefill("holder", 11_000), prefill("idle")
    asked = {"num_tokens": 10_000, "cached": {"holder": 8_000}}
    assert prefix(snapshot([holder, idle], [ROOMY], **asked)) == Placement(prefill="holder", decode="d-roomy")
    late = snapshot([holder, idle], [ROOMY], slack_s=1.0, **asked)
    assert prefix(late) == Placement(prefill="idle", decode="d-roomy")


def test_the_decode_worker_that_holds_the_prompt_needs_fewer_blocks_and_bytes() -> None:
    other = decode("d-other", 600)
    placed = prefix(snapshot([FAST], [other, ROOMY], num_tokens=8_000, cached={"d-roomy": 7_000}))
    assert placed == Placement(prefill="p-fast", decode="d-roomy")


def test_a_decode_worker_without_the_blocks_is_taken_only_if_nobody_has_them() -> None:
    quick = MeasuredTimes(prefill_tokens_per_s=1e4, decode_step_time_s=0.001)
    slow = MeasuredTimes(prefill_tokens_per_s=1e4, decode_step_time_s=0.1)
    tight, loose = decode("d-tight", 50, times=quick), decode("d-loose", 100, times=slow)
    assert prefix(snapshot([FAST], [tight, loose], num_tokens=1_600)) == Placement(prefill="p-fast", decode="d-loose")
    assert prefix(snapshot([FAST], [tight], num_tokens=1_600)) == Placement(prefill="p-fast", decode="d-tight")


def test_a_slow_decode_step_and_a_full_pool_cost() -> None:
    times = [MeasuredTimes(prefill_tokens_per_s=1e4, decode_step_time_s=step_s) for step_s in (0.01, 0.02)]
    quick, slow = (decode(name, 500, times=each) for name, each in zip(("quick", "slow"), times, strict=True))
    assert prefix(snapshot([FAST], [slow, quick])) == Placement(prefill="p-fast", decode="quick")
    full = decode("full", 70, times=times[0])
    assert prefix(snapshot([FAST], [full, slow])) == Placement(prefill="p-fast", decode="slow")


def test_a_quick_measurement_does_not_draw_every_request_to_its_worker() -> None:
    """Two equal workers, of whom one happened to measure a step half as long."""
    steps, running = {"lucky": 0.01, "other": 0.02}, Counter({"lucky": 4, "other": 4})

    def measured(name: str) -> DecodeLoad:
        times = MeasuredTimes(prefill_tokens_per_s=1e4, decode_step_time_s=steps[name], decode_batch=4)
        return decode(name, 500 - running[name], sequences=running[name], times=times)

    for _ in range(40):
        placed = prefix(snapshot([FAST], [measured(name) for name in steps]))
        assert placed is not None
        running[placed.decode] += 1
    assert min(running.values()) >= 10


def test_the_pair_is_chosen_together_for_the_link_between_them() -> None:
    here, there = Place(host="a", rack="1"), Place(host="b", rack="2")
    prefills = [prefill("p-a", 10, place=here), prefill("p-b", 0, place=there)]  # b is a little sooner
    decodes = [decode("d-a", 500, place=here), decode("d-c", 500, place=Place(host="c", rack="1"))]
    moved = snapshot(prefills, decodes, num_tokens=200, kv_bytes_per_token=50e6)  # 10 GB
    assert prefix(moved) == Placement(prefill="p-a", decode="d-c")  # within the rack, not through one host's memory
    light = snapshot(prefills, decodes, num_tokens=200, kv_bytes_per_token=1.0)
    placed = prefix(light)
    assert placed is not None
    assert placed.prefill == "p-b"


def test_without_prefill_workers_the_cache_decides_among_colocated_ones() -> None:
    times = MeasuredTimes(prefill_tokens_per_s=1e4, decode_step_time_s=0.01)
    workers = [decode("c0", 500, colocated=True, times=times), decode("c1", 450, colocated=True, times=times)]
    assert prefix(snapshot([], workers, alive=False, num_tokens=4_000)) == Placement(prefill=None, decode="c0")
    placed = prefix(snapshot([], workers, alive=False, num_tokens=4_000, cached={"c1": 3_000}))
    assert placed == Placement(prefill=None, decode="c1")


def test_a_fresh_prefill_worker_gets_its_share() -> None:
    """Taken to do 1,000 tokens a second beside one that does 50,000, it got nothing while requests waited."""
    counts = dict.fromkeys(("p0", "p1"), 0)
    for _ in range(20):
        prefills = [
            prefill("p0", 4_000 * counts["p0"], speed=50_000.0),
            replace(prefill("p1", 4_000 * counts["p1"], speed=0.0), assumed_tokens_per_s=50_000.0),
        ]
        placed = prefix(snapshot(prefills, [decode("d")], num_tokens=4_000))
        assert placed is not None
        assert placed.prefill is not None
        counts[placed.prefill] += 1
    assert counts == {"p0": 10, "p1": 10}


@pytest.mark.parametrize("known", [("c0",), ("c0", "c1"), ()])
def test_colocated_workers_share_requests_whatever_is_known_of_them(known: tuple[str, ...]) -> None:
    """One that had computed no prompt yet seemed infinitely slow, so the first one got everything."""
    measured = MeasuredTimes(prefill_tokens_per_s=1e4, decode_step_time_s=0.01, decode_batch=4)
    unknown = MeasuredTimes(prefill_tokens_per_s=0.0, decode_step_time_s=0.0)
    counts = dict.fromkeys(("c0", "c1"), 0)
    for _ in range(20):
        workers = [
            decode(
                name,
                1000 - 63 * count,
                sequences=count,
                colocated=True,
                times=measured if name in known else unknown,
                local_tokens=1000 * count,
            )
            for name, count in counts.items()
        ]
        placed = prefix(snapshot([], workers, alive=False, num_tokens=1_000))
        assert placed is not None
        counts[placed.decode] += 1
    assert counts == {"c0": 10, "c1": 10}


# By name.


def test_policies_are_known_by_name_and_other_packages_bring_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    group = "splitserve.routing_policies"
    brought = [
        EntryPoint("mine", "splitserve.scheduling.policies.round_robin:round_robin", group),
        EntryPoint("gone", "no_such_package:policy", group),
        EntryPoint("number", "math:pi", group),
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda group: EntryPoints(brought))
    monkeypatch.setattr("splitserve.scheduling.policies.registry.entry_points", metadata.entry_points)
    assert load_policy("prefix") is prefix
    assert load_policy("mine") is round_robin
    for name, complaint in (("gone", "cannot be imported"), ("number", "not a function"), ("best", "wanted one of")):
        with pytest.raises(ConfigError, match=complaint):
            load_policy(name)
