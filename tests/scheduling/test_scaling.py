"""Scaling decisions: right sizes, one budget, hysteresis, switches, and replay."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve.core.errors import ConfigError
from splitserve.scheduling.gpu_budget import PoolBounds, num_gpus, share
from splitserve.scheduling.scaling import SloScaling
from splitserve.scheduling.scaling_log import ScalingRecord, read_records, replay
from splitserve.scheduling.scaling_signals import POOLS, ScalingDecision, ScalingSignals

from .scaled_cluster import KV_TOKENS, PERIOD_S, ScaledCluster, Times, config, gpus


def run(cluster: ScaledCluster, policy: SloScaling, rate: float, seconds: float) -> ScalingDecision:
    for _ in range(int(seconds / PERIOD_S)):
        cluster.enact(policy.decide(cluster.signals(rate)))
    return cluster.history[-1]


def test_pools_grow_independently_by_what_each_lacks() -> None:
    long_prompts, long_answers = (SloScaling(config(), Times()) for _ in range(2))
    prompts = ScaledCluster(prefill=1, decode=1).signals(40.0)
    traffic = replace(prompts.traffic, output_tokens=prompts.traffic.num_ended * 2)
    first = long_prompts.decide(replace(prompts, traffic=traffic))
    traffic = replace(prompts.traffic, prefill_tokens=prompts.traffic.num_arrived * 50, prefill_tokens_squared=0.0)
    traffic = replace(traffic, output_tokens=prompts.traffic.num_ended * 2_000)
    second = long_answers.decide(replace(prompts, traffic=traffic))
    assert first.targets["prefill"] >= 3
    assert first.targets["decode"] == 1
    assert second.targets["prefill"] == 1
    assert second.targets["decode"] >= 3


def test_a_step_up_and_down_comes_back_to_where_it_was() -> None:
    cluster, policy = ScaledCluster(prefill=2, decode=1), SloScaling(config(), Times())
    low = run(cluster, policy, 10.0, 600).targets
    high = run(cluster, policy, 150.0, 600).targets
    assert high["prefill"] > 2 * low["prefill"]
    assert high["decode"] > low["decode"]
    assert run(cluster, policy, 10.0, 900).targets == low


def test_a_rising_load_is_met_before_it_arrives() -> None:
    """The forecast looks as far ahead as a worker takes to start; the level alone would come late."""
    cluster, policy = ScaledCluster(prefill=1, decode=1), SloScaling(config(), Times())
    rates = [10.0] * 20 + [10.0 + 5.0 * n for n in range(40)]
    for rate in rates:
        cluster.enact(policy.decide(cluster.signals(rate)))
    steady = SloScaling(config(), Times())
    for _ in range(40):
        enough = steady.decide(cluster.signals(rates[-1]))
    assert cluster.history[-1].needed["prefill"] > enough.needed["prefill"]


def test_queued_prompts_raise_prefill_and_a_full_decode_pool_raises_decode() -> None:
    signals = ScaledCluster(prefill=2, decode=2).signals(10.0)
    calm = SloScaling(config(), Times()).decide(signals).needed
    queued = replace(signals.traffic, num_queued=200, queued_prefill_tokens=400_000)
    behind = SloScaling(config(), Times()).decide(replace(signals, traffic=queued)).needed
    full = tuple(replace(worker, kv_used=0.97) for worker in signals.decode)
    blocked = SloScaling(config(), Times()).decide(replace(signals, traffic=queued, decode=full)).needed
    assert behind["prefill"] > calm["prefill"]
    assert behind["decode"] == calm["decode"]
    assert blocked["prefill"] == calm["prefill"]  # they wait for decode, more prefill workers would not help
    assert blocked["decode"] > calm["decode"]
    most = config().limits.max_running
    batches = tuple(replace(worker, num_sequences=most) for worker in signals.decode)
    blocked = SloScaling(config(), Times()).decide(replace(signals, traffic=queued, decode=batches)).needed
    assert blocked["prefill"] == calm["prefill"]
    assert blocked["decode"] > calm["decode"]


def test_a_missed_service_level_corrects_a_model_that_is_too_kind() -> None:
    policy, cluster = SloScaling(config(), Times()), ScaledCluster(prefill=2, decode=2)
    run(cluster, policy, 30.0, 300)

    def late() -> ScalingDecision:
        signals = cluster.signals(30.0)
        return policy.decide(replace(signals, traffic=replace(signals.traffic, ttft_s=2.0)))

    before = policy.decide(cluster.signals(30.0))
    assert before.targets["prefill"] == before.needed["prefill"] == 2
    for _ in range(2):  # what is late may have waited before the pool had grown
        cluster.now += PERIOD_S
        assert late().targets == before.targets
    cluster.now += PERIOD_S
    after = late()
    assert after.targets == {"prefill": 3, "decode": before.targets["decode"]}
    assert "service level was missed" in after.reasons[0]


def test_samples_of_workers_that_just_started_say_nothing() -> None:
    """Without a latency model, the measured speed counts; a cold worker's is ignored, and so is a TTFT beside it."""
    signals = ScaledCluster(prefill=2, decode=2).signals(40.0)
    cold = replace(signals.prefill[0], worker="new", state_s=1.0, prefill_tokens_per_s=10.0)
    traffic = replace(signals.traffic, ttft_s=9.0)
    with_cold = replace(signals, prefill=(*signals.prefill, cold), traffic=traffic)
    expected = SloScaling(config(), None).decide(signals).needed
    assert SloScaling(config(), None).decide(with_cold).needed == expected
    warm = replace(with_cold, prefill=(*signals.prefill, replace(cold, state_s=60.0)))
    assert SloScaling(config(), None).decide(warm).needed["prefill"] > expected["prefill"]


def test_without_model_and_measurements_a_pool_keeps_its_size() -> None:
    signals = ScaledCluster(prefill=3, decode=3).signals(40.0)
    silent = tuple(replace(worker, prefill_tokens_per_s=0.0, decode_step_s=0.0) for worker in signals.prefill)
    decision = SloScaling(config(), None).decide(replace(signals, prefill=silent, decode=silent))
    assert decision.targets == {"prefill": 3, "decode": 3}
    assert "no prefill speed measured yet" in decision.reasons[0]


def test_a_worker_that_one_pool_can_spare_switches_to_the_other() -> None:
    policy = SloScaling(config(max_gpus=8), Times())
    cluster = ScaledCluster(prefill=7, decode=1)
    run(cluster, policy, 10.0, 60)  # decode is content, prefill has more than it needs
    signals = cluster.signals(10.0)
    longer = replace(signals.traffic, output_tokens=signals.traffic.num_ended * 4_000)
    for _ in range(20):
        decision = policy.decide(replace(cluster.signals(10.0), traffic=longer))
        cluster.enact(decision)
        if decision.actions:
            break
    assert {action.kind for action in decision.actions} == {"switch"}
    assert all(action.pool == "prefill" and action.to_pool == "decode" for action in decision.actions)
    assert decision.targets["decode"] > 1
    assert "1 -> " in decision.reasons[1]


def test_scale_down_drains_whoever_has_least_to_finish() -> None:
    policy = SloScaling(config(role_switch=False), Times())
    cluster = ScaledCluster(prefill=4, decode=1)
    while True:
        signals = cluster.signals(2.0)
        busy = tuple(replace(w, num_sequences=9 - n) for n, w in enumerate(signals.prefill))
        decision = policy.decide(replace(signals, prefill=busy))
        cluster.enact(decision)
        if decision.actions:
            break
    assert [(action.kind, action.worker) for action in decision.actions] == [("drain", "prefill-3")]


def test_a_pool_that_shrank_waits_before_it_shrinks_again() -> None:
    policy, cluster = SloScaling(config(), Times()), ScaledCluster(prefill=16, decode=1)
    run(cluster, policy, 2.0, 600)
    at = [decision.at_s for decision in cluster.history if any(a.pool == "prefill" for a in decision.actions)]
    assert len(at) >= 3
    assert at[0] - cluster.history[0].at_s >= config().down_after_s
    assert min(b - a for a, b in itertools.pairwise(at)) >= config().down_cooldown_s


@pytest.mark.parametrize("rate", [1.0, 7.0, 60.0, 200.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_constant_load_makes_no_oscillation(rate: float, seed: int) -> None:
    """An hour of Poisson arrivals: after the pools have found their size, nobody turns back and forth."""
    chance, cluster, policy = random.Random(seed), ScaledCluster(prefill=4, decode=3), SloScaling(config(), Times())
    for _ in range(int(3600 / PERIOD_S)):
        mean = rate * PERIOD_S
        arrived = max(0, round(chance.gauss(mean, mean**0.5)))
        cluster.enact(policy.decide(cluster.signals(rate, num_arrived=arrived)))
    assert cluster.reversals("prefill") <= 2
    assert cluster.reversals("decode") <= 2


@settings(max_examples=60, deadline=None)
@given(
    rates=st.lists(st.floats(0, 400), min_size=3, max_size=30),
    prefill=st.integers(1, 9),
    decode=st.integers(1, 9),
    budget=st.integers(12, 40),
    sizes=st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 2])),
    minima=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    role_switch=st.booleans(),
)
def test_never_over_budget_and_never_below_the_minimum(
    rates: list[float],
    prefill: int,
    decode: int,
    budget: int,
    sizes: tuple[int, int],
    minima: tuple[int, int],
    role_switch: bool,
) -> None:
    bounds = [PoolBounds(min_workers=m, max_workers=30, gpus_per_worker=g) for m, g in zip(minima, sizes, strict=True)]
    settings_ = config(prefill=bounds[0], decode=bounds[1], max_gpus=budget, role_switch=role_switch, down_after_s=20.0)
    # A pool that begins below its minimum waits for the other's drains, if those hold the whole budget.
    sized = [max(count, minimum) for count, minimum in zip((prefill, decode), minima, strict=True)]
    policy, cluster = SloScaling(settings_, Times()), ScaledCluster(prefill=sized[0], decode=sized[1])
    per_worker = {"prefill": sizes[0], "decode": sizes[1]}
    for rate in rates:
        signals = cluster.signals(rate)
        decision = policy.decide(signals)
        assert num_gpus(decision.targets, settings_.bounds()) <= max(budget, 0)
        cluster.enact(decision)
        starts = sum(action.kind == "start" for action in decision.actions)
        after = cluster.signals(rate)
        if starts:
            assert gpus(after, per_worker) <= budget  # drains that are not over count too
        for pool, minimum in zip(POOLS, minima, strict=True):
            assert decision.targets[pool] >= minimum
            had = sum(worker.state != "draining" for worker in signals.pool(pool))
            assert cluster.active(pool) >= min(minimum, had)
        named = [action.worker for action in decision.actions if action.kind != "start"]
        assert max(Counter(named).values(), default=1) == 1


@settings(max_examples=60, deadline=None)
@given(
    rate=st.floats(0.1, 300),
    more=st.floats(1.0, 3.0),
    prompt=st.integers(10, 20_000),
    answer=st.integers(1, 2_000),
    queued=st.integers(0, 1_000_000),
    used=st.floats(0, 1),
)
def test_more_load_never_needs_fewer_workers(
    rate: float, more: float, prompt: int, answer: int, queued: int, used: float
) -> None:
    def needed(factor: float) -> ScalingDecision:
        signals = ScaledCluster(prefill=2, decode=2).signals(rate)
        count = round(rate * factor * 1_000)
        traffic = replace(
            signals.traffic,
            interval_s=1_000.0,
            num_arrived=count,
            num_ended=count,
            prefill_tokens=count * prompt,
            prefill_tokens_squared=float(count * prompt**2),
            output_tokens=count * answer,
            queued_prefill_tokens=round(queued * factor),
        )
        decode = tuple(replace(worker, kv_used=min(1.0, used * factor)) for worker in signals.decode)
        return SloScaling(config(), Times()).decide(replace(signals, traffic=traffic, decode=decode))

    less, larger = needed(1.0).needed, needed(more).needed
    assert larger["decode"] >= less["decode"]
    if used * more < config().max_kv_used:  # where decode is full, what is queued counts there
        assert larger["prefill"] >= less["prefill"]


@settings(max_examples=100, deadline=None)
@given(wants=st.tuples(st.integers(1, 40), st.integers(1, 40)), budget=st.integers(4, 60))
def test_a_scarce_budget_is_shared_in_proportion(wants: tuple[int, int], budget: int) -> None:
    bounds = {pool: PoolBounds(min_workers=1, max_workers=64) for pool in POOLS}
    wanted = dict(zip(POOLS, wants, strict=True))
    shared = share(wanted, wanted, bounds, budget)
    assert num_gpus(shared, bounds) == min(budget, sum(wants))
    parts = [shared[pool] / wanted[pool] for pool in POOLS]
    assert abs(parts[0] - parts[1]) <= 1 / min(wants) + 1e-9


def test_settings_that_no_cluster_meets_are_refused() -> None:
    with pytest.raises(ConfigError, match="GPU budget is 1 and the fewest workers of both pools hold 2"):
        config(max_gpus=1)
    with pytest.raises(ConfigError, match="bounds are 3 to 2"):
        config(decode=PoolBounds(min_workers=3, max_workers=2))


def test_a_log_replays_to_the_same_decisions_and_shows_another_policys() -> None:
    cluster, policy = ScaledCluster(prefill=2, decode=1), SloScaling(config(), Times())
    lines = []
    for step in range(60):
        signals = cluster.signals(10.0 + step * 2)
        decision = policy.decide(signals)
        lines.append(ScalingRecord(signals=signals, decision=decision).to_line())
        cluster.enact(decision)
    records = list(read_records(lines))
    assert [record.to_line() for record in records] == lines
    assert replay(records, SloScaling(config(), Times())) == []
    assert replay(records, SloScaling(config(), Times(prefill_token_s=1e-4)))


def test_a_line_that_is_no_record_is_named() -> None:
    with pytest.raises(ConfigError, match="line 2 is no scaling record"):
        list(read_records(["", json.dumps({"signals": {}})]))


def test_signals_survive_json() -> None:
    signals = ScaledCluster(prefill=2, decode=1).signals(10.0)
    assert ScalingSignals.from_json(json.loads(json.dumps(signals.to_json()))) == signals
    assert signals.decode[0].kv_tokens == KV_TOKENS
