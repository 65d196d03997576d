"""The simulator: times that can be worked out by hand, conservation, and the same answer each time."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve.core.errors import ConfigError
from splitserve.core.events import TERMINAL, Event
from splitserve.planner.simulator import RouterLimits, Simulation, SimulationResult, simulate
from splitserve.planner.types import ClusterSpec, SimRequest, Slo
from splitserve.scheduling.routing import Placement, Snapshot
from splitserve.scheduling.steps import StepScheduler

from .clusters import LinearLatency, cluster, pool

STEADY = LinearLatency(step_s=0.010, prefill_token_s=1e-5)


def one(isl: int, osl: int, arrival_s: float = 0.0) -> SimRequest:
    return SimRequest(arrival_s=arrival_s, isl=isl, osl=osl)


def test_one_request_takes_prefill_then_a_step_for_each_further_token() -> None:
    result = simulate(cluster(pool(STEADY), pool(STEADY), router_s=0.002), [one(1000, 11)])
    prefill_s = 0.010 + 1000 * 1e-5
    assert result.ttft_s[0] == pytest.approx(0.002 + prefill_s)
    assert result.queue_s[0] == pytest.approx(0.002)
    assert result.tpot_s[0] == pytest.approx(0.010)
    assert result.e2e_s[0] == pytest.approx(0.002 + prefill_s + 10 * 0.010)
    assert result.transfer_exposed_s[0] == 0.0  # 131 MB in 5 ms, behind 20 ms of prefill
    assert result.kv_bytes == 1000 * 131_072
    assert result.percentile("itl", 99) == pytest.approx(0.010)
    assert result.mean_batch["decode"] == 1.0
    assert result.utilisation["decode"] == pytest.approx(0.100 / 0.122)  # of the time from arrival to the end
    assert [event for event, _ in result.events[0]] == [
        Event.ARRIVED,
        Event.ADMITTED,
        Event.GRANTED,
        Event.PREFILL_QUEUED,
        Event.PREFILL_STARTED,
        Event.TRANSFER_STARTED,
        Event.FIRST_TOKEN,
        Event.TRANSFER_FINISHED,
        Event.DECODE_QUEUED,
        Event.DECODE_STARTED,
        Event.FINISHED,
    ]


def test_a_slow_link_delays_the_second_token_and_not_the_first() -> None:
    slow = cluster(pool(STEADY), pool(STEADY), link_bytes_per_s=131_072 * 1000 / 0.5, link_latency_s=0.001)
    result = simulate(slow, [one(1000, 3)])
    assert result.ttft_s[0] == pytest.approx(0.020)
    assert result.transfer_exposed_s[0] == pytest.approx(0.5 - 0.020 + 0.001)
    assert result.itl_max_s[0] == pytest.approx(0.481 + 0.010)
    assert result.tpot_s[0] == pytest.approx((0.481 + 0.020) / 2)


def test_transfers_share_a_workers_side_of_the_link() -> None:
    slow = cluster(pool(STEADY), pool(STEADY, num_workers=2), link_bytes_per_s=131_072 * 1000 / 0.5)
    result = simulate(slow, [one(1000, 3), one(1000, 3)])
    assert result.e2e_s.tolist() == pytest.approx([0.5 + 0.020, 1.0 + 0.020])  # one step computes both prompts


def test_colocated_prefill_stalls_the_tokens_of_others() -> None:
    latency = LinearLatency(step_s=0.010, prefill_token_s=1e-4)
    requests = [one(100, 50), one(4000, 2, arrival_s=0.1)]
    colocated = simulate(cluster(None, pool(latency)), requests)
    split = simulate(cluster(pool(latency), pool(latency)), requests)
    assert colocated.itl_max_s[0] == pytest.approx(0.010 + 0.4)
    assert split.itl_max_s[0] == pytest.approx(0.010)
    assert colocated.kv_bytes == 0.0


def test_a_prompt_is_prefilled_in_chunks() -> None:
    chunked = simulate(cluster(pool(STEADY, max_step_tokens=256), pool(STEADY)), [one(1000, 1)])
    assert chunked.ttft_s[0] == pytest.approx(4 * 0.010 + 1000 * 1e-5)


def test_answers_of_one_token_free_both_sides() -> None:
    simulation = Simulation(cluster(pool(), pool()), [one(500, 1, i * 0.001) for i in range(50)])
    result = simulation.run()
    assert result.num_finished == 50
    assert np.isnan(result.tpot_s).all()
    assert_idle(simulation)


def test_decode_that_runs_out_of_blocks_preempts_and_finishes() -> None:
    small = pool(num_blocks=60)
    simulation = Simulation(cluster(None, small), [one(200, 200) for _ in range(4)], block_tokens=16)
    result = simulation.run()
    assert result.num_preemptions > 0
    assert result.num_finished == 4
    assert sum(event is Event.PREEMPTED for life in result.events for event, _ in life) == result.num_preemptions
    assert sum(event is Event.RESUMED for life in result.events for event, _ in life) == result.num_preemptions
    assert_idle(simulation)


def test_requests_past_the_bound_are_refused_and_count_as_misses() -> None:
    limits = RouterLimits(max_queued=4, max_live=8)
    result = simulate(cluster(pool(), pool()), [one(4000, 10) for _ in range(20)], limits=limits)
    assert 0 < result.num_finished < 20
    assert result.errors == {"overloaded": 20 - result.num_finished}
    assert result.percentile("ttft", 99) == np.inf
    assert result.goodput(Slo(ttft_s=1e9)) == pytest.approx(result.requests_per_s)


def test_a_prompt_that_no_worker_can_hold_fails_alone() -> None:
    result = simulate(cluster(pool(), pool(num_blocks=100)), [one(5000, 10), one(100, 10)])
    assert result.errors == {"prompt_too_long": 1}
    assert np.isfinite(result.e2e_s).tolist() == [False, True]


def test_nothing_to_simulate_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no requests"):
        simulate(cluster(pool(), pool()), [])


def test_shared_prefixes_are_computed_and_moved_once() -> None:
    split = cluster(pool(), pool(), prefix_cache=True)
    first = SimRequest(arrival_s=0.0, isl=1024, osl=2, hash_ids=(1, 2), hash_block_tokens=512)
    again = SimRequest(arrival_s=10.0, isl=1500, osl=2, hash_ids=(1, 2, 3), hash_block_tokens=512)
    other = SimRequest(arrival_s=20.0, isl=1500, osl=2, hash_ids=(7, 2, 3), hash_block_tokens=512)
    result = simulate(split, [first, again, other], block_tokens=16)
    assert result.cached_tokens.tolist() == [0, 1024, 0]
    assert result.kv_bytes == (1024 + 1500 - 1024 + 1500) * 131_072
    assert result.ttft_s[1] < result.ttft_s[2]


def test_a_worker_that_is_added_takes_work_and_a_retired_one_gets_none() -> None:
    requests = [one(2000, 20, i * 0.02) for i in range(200)]
    simulation = Simulation(cluster(pool(), pool(), router_s=0.0), requests)
    simulation.at(1.0, simulation.add_prefill_worker)
    simulation.at(2.0, lambda: simulation.retire_worker("prefill-0"))
    result = simulation.run()
    assert result.num_finished == 200
    assert len(simulation.workers["prefill-1"].log) > 0
    assert_idle(simulation)


def test_a_policy_chooses_the_workers_and_chance_comes_from_the_seed() -> None:
    def random_pair(snapshot: Snapshot) -> Placement:
        view, draw = snapshot.view, snapshot.request.draw
        return Placement(
            prefill=view.prefills[draw % len(view.prefills)].worker,
            decode=view.decodes[(draw >> 32) % len(view.decodes)].worker,
        )

    spec = cluster(pool(num_workers=3), pool(num_workers=3))
    requests = [one(2000, 20, i * 0.02) for i in range(100)]
    first, again, other = (simulate(spec, requests, policy=random_pair, seed=seed) for seed in (1, 1, 2))
    assert (first.ttft_s == again.ttft_s).all()
    assert (first.ttft_s != other.ttft_s).any()
    assert simulate(spec, requests).percentile("ttft", 90) < first.percentile("ttft", 90)


requests_strategy = st.lists(
    st.tuples(st.floats(0, 0.3), st.integers(1, 1200), st.integers(1, 120)), min_size=1, max_size=25
)  # seconds since the one before, prompt, answer
clusters_strategy = st.builds(
    lambda colocated, num_prefill, num_decode, num_blocks, chunk, cache: cluster(
        None if colocated else pool(num_workers=num_prefill, num_blocks=max(100, num_blocks), max_step_tokens=chunk),
        pool(num_workers=num_decode, num_blocks=num_blocks, max_step_tokens=chunk),
        link_bytes_per_s=2e9,
        prefix_cache=cache,
    ),
    st.booleans(),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(90, 400),
    st.sampled_from([64, 1000, 8192]),
    st.booleans(),
)


def make_requests(rows: list[tuple[float, int, int]]) -> list[SimRequest]:
    requests: list[SimRequest] = []
    at_s = 0.0
    for number, (after_s, isl, osl) in enumerate(rows):
        at_s += after_s
        ids = tuple(block if block < number % 4 else 100 * number + block for block in range(-(-isl // 64)))
        requests.append(SimRequest(arrival_s=at_s, isl=isl, osl=osl, hash_ids=ids, hash_block_tokens=64))
    return requests


def assert_idle(simulation: Simulation) -> None:
    """Every block is free or only cached."""
    for worker in simulation.workers.values():
        counts = worker.scheduler.blocks.counts()
        assert counts.live == counts.granted == 0
        assert counts.free + counts.cached == counts.total
        assert not worker.scheduler.has_work


def assert_counts_add_up(result: SimulationResult, spec: ClusterSpec, requests: list[SimRequest]) -> None:
    """Every request ends exactly once, in order of its life, and every gap between tokens is there."""
    assert result.num_finished + sum(result.errors.values()) == len(requests)
    for life in result.events:
        events = [event for event, _ in life]
        assert sum(event in TERMINAL for event in events) == 1
        assert events[0] is Event.ARRIVED
    gaps = sum(request.osl - 1 for request, e2e in zip(requests, result.e2e_s, strict=True) if np.isfinite(e2e))
    assert result.itl_weights.sum() == pytest.approx(gaps)
    finite = np.isfinite(result.e2e_s)
    decode_s = (result.e2e_s - result.ttft_s)[finite].sum()
    # Gaps of a run are told by four of them.
    assert (result.itl_gaps_s * result.itl_weights).sum() == pytest.approx(decode_s, rel=1e-3)
    assert (
        result.itl_max_s[finite & ~np.isnan(result.tpot_s)] >= result.tpot_s[finite & ~np.isnan(result.tpot_s)] - 1e-9
    ).all()


@settings(deadline=None, max_examples=50)
@given(requests_strategy, clusters_strategy)
def test_every_request_ends_once_and_every_block_comes_back(
    rows: list[tuple[float, int, int]], spec: ClusterSpec
) -> None:
    requests = make_requests(rows)
    simulation = Simulation(spec, requests, block_tokens=16)
    result = simulation.run()
    assert_counts_add_up(result, spec, requests)
    assert_idle(simulation)


def test_a_sequence_that_preempts_itself_where_nobody_else_runs_keeps_its_gaps() -> None:
    """The others' blocks are reserved for KV on its way: nothing is left to plan."""
    answers = [(986, 120), (817, 100), (321, 64), (3, 120), (588, 5), (66, 78), (70, 15)]
    requests = make_requests([(0.0, isl, osl) for isl, osl in answers])
    sizes = {"num_blocks": 146, "max_step_tokens": 8192}
    spec = cluster(pool(num_workers=3, **sizes), pool(num_workers=1, **sizes), link_bytes_per_s=2e9, prefix_cache=False)
    simulation = Simulation(spec, requests, block_tokens=16)
    result = simulation.run()
    assert_counts_add_up(result, spec, requests)
    assert_idle(simulation)
    assert any(event is Event.PREEMPTED for life in result.events for event, _ in life)


@settings(deadline=None, max_examples=50)
@given(requests_strategy, clusters_strategy)
def test_littles_law(rows: list[tuple[float, int, int]], spec: ClusterSpec) -> None:
    """The time integral of the number of live requests, from the events, is the sum of their times in the system."""
    result = simulate(spec, make_requests(rows))
    changes = sorted(
        (at_s, +1 if event is Event.ARRIVED else -1)
        for life in result.events
        if not any(event is Event.FAILED for event, _ in life)
        for event, at_s in life
        if event is Event.ARRIVED or event is Event.FINISHED
    )
    area, live, before_s = 0.0, 0, 0.0
    for at_s, change in changes:
        area += live * (at_s - before_s)
        live, before_s = live + change, at_s
    assert live == 0
    assert area == pytest.approx(result.e2e_s[np.isfinite(result.e2e_s)].sum())


@settings(deadline=None, max_examples=50)
@given(requests_strategy, clusters_strategy)
def test_the_same_run_gives_the_same_numbers(rows: list[tuple[float, int, int]], spec: ClusterSpec) -> None:
    first, second = (simulate(spec, make_requests(rows), seed=5) for _ in range(2))
    for field in dataclasses.fields(SimulationResult):
        one, two = getattr(first, field.name), getattr(second, field.name)
        if isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, two)
        else:
            assert one == two


@settings(deadline=None, max_examples=50)
@given(requests_strategy, clusters_strategy)
def test_skipping_ahead_changes_no_time(rows: list[tuple[float, int, int]], spec: ClusterSpec) -> None:
    spec = dataclasses.replace(spec, prefix_cache=False)  # which blocks are evicted depends on the order of growth
    skipped = simulate(spec, make_requests(rows), block_tokens=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepScheduler, "steps_until_change", lambda self: None)
        stepped = simulate(spec, make_requests(rows), block_tokens=16)
    np.testing.assert_allclose(skipped.ttft_s, stepped.ttft_s)
    np.testing.assert_allclose(skipped.e2e_s, stepped.e2e_s)
    np.testing.assert_allclose(skipped.itl_max_s, stepped.itl_max_s)
    assert skipped.num_preemptions == stepped.num_preemptions
