"""A scaled cluster in simulation: requests survive every change, GPUs are counted, shortage makes no oscillation."""

from __future__ import annotations

import dataclasses

import pytest
from splitserve.planner.overlaid_traffic import overlay
from splitserve.planner.simulated_scaling import ScalingOutcome, ScalingSimulation, ScalingTimes
from splitserve.planner.simulator import RouterLimits
from splitserve.planner.types import SimRequest, Slo
from splitserve.scheduling.gpu_budget import PoolBounds
from splitserve.scheduling.pool_needs import ServiceLevel
from splitserve.scheduling.scaling import SloScaling
from splitserve.scheduling.scaling_config import ScalingConfig, ScalingPolicy
from splitserve.scheduling.scaling_log import ScalingRecord, replay
from splitserve.scheduling.scaling_signals import ScalingAction, ScalingDecision, ScalingSignals

from .clusters import LinearLatency, cluster, pool

# About ten times slower than a large GPU, so that few requests need many workers.
SLOW = LinearLatency(step_s=0.02, prefill_token_s=2.5e-4, decode_sequence_s=1e-3, decode_context_s=3e-7)
SLO = Slo(ttft_s=3.0, tpot_s=0.08)
TIMES = ScalingTimes(period_s=5.0, startup_s=20.0)


def steps(at_s: float) -> float:
    """A step up and down again."""
    return 1.0 if 60 <= at_s < 200 else 0.25


def requests(num_tenants: int = 8, duration_s: float = 400.0) -> list[SimRequest]:
    trace = [SimRequest(arrival_s=float(n), isl=600 + 40 * (n % 21), osl=20 + n % 50) for n in range(40)]
    return overlay(trace, num_tenants=num_tenants, duration_s=duration_s, load=steps)


def config(max_gpus: int | None = None) -> ScalingConfig:
    return ScalingConfig(
        prefill=PoolBounds(min_workers=1, max_workers=30),
        decode=PoolBounds(min_workers=1, max_workers=30),
        level=ServiceLevel(ttft_s=SLO.ttft_s, tpot_s=SLO.tpot_s),
        max_gpus=max_gpus,
        startup_s=TIMES.startup_s,
        down_after_s=60.0,
    )


class Recorded:
    """A policy that keeps what it was told. Implements `ScalingPolicy`."""

    def __init__(self, policy: ScalingPolicy) -> None:
        self.policy = policy
        self.records: list[ScalingRecord] = []

    def decide(self, signals: ScalingSignals) -> ScalingDecision:
        decision = self.policy.decide(signals)
        self.records.append(ScalingRecord(signals=signals, decision=decision))
        return decision


def scaled(
    policy: ScalingPolicy | None,
    traffic: list[SimRequest],
    *,
    prefill: int = 1,
    decode: int = 1,
    max_gpus: int | None = None,
) -> ScalingOutcome:
    spec = cluster(pool(SLOW, num_workers=prefill), pool(SLOW, num_workers=decode, num_blocks=4_000))
    return ScalingSimulation(
        spec, traffic, scaling=policy, times=TIMES, max_gpus=max_gpus, limits=RouterLimits(max_queued=10**6)
    ).run_scaled()


@pytest.mark.verify
def test_both_pools_follow_a_step_up_and_down_and_no_request_fails() -> None:
    traffic = requests()
    policy = Recorded(SloScaling(config(), SLOW))
    outcome = scaled(policy, traffic)
    targets = [decision.targets for decision in outcome.decisions]
    assert max(target["prefill"] for target in targets) >= 2 * targets[5]["prefill"]
    assert targets[-1]["prefill"] <= targets[5]["prefill"] + 1
    assert outcome.num_actions["start"] >= 2
    assert outcome.num_actions["drain"] + outcome.num_actions.get("switch", 0) >= 2
    assert outcome.num_reversals <= 3
    assert outcome.result.num_finished == len(traffic)
    assert outcome.result.met(SLO).mean() > 0.75  # the step is there 20 s before the workers that it needs
    assert outcome.result.met(SLO).mean() > 2 * scaled(None, traffic).result.met(SLO).mean()
    # The same signals give the same decisions again.
    assert replay(policy.records, SloScaling(config(), SLOW)) == []


def test_gpu_time_is_that_of_every_worker_from_its_start_to_its_end() -> None:
    traffic = requests()
    fixed = scaled(None, traffic, prefill=3, decode=2)
    assert fixed.gpu_s == pytest.approx(5 * traffic[-1].arrival_s)
    assert fixed.max_gpus == 5
    assert fixed.decisions == ()
    follows = scaled(SloScaling(config(), SLOW), traffic)
    between = zip(follows.samples, follows.samples[1:], strict=False)
    area = sum((after[0] - before[0]) * before[3] for before, after in between if after[0] <= traffic[-1].arrival_s)
    assert follows.gpu_s == pytest.approx(area, rel=0.05)


def test_a_shortage_is_shared_without_workers_going_to_and_fro() -> None:
    """More load than the budget carries: queues grow, and where they stand must not throw workers about."""
    policy = SloScaling(config(max_gpus=5), SLOW)
    outcome = scaled(policy, requests(num_tenants=16), prefill=3, decode=1, max_gpus=5)
    assert outcome.max_gpus <= 5
    assert outcome.num_actions.get("switch", 0) <= 4  # in 400 s
    assert outcome.num_reversals <= 2 * 4


def test_a_switched_worker_serves_in_its_new_role_after_its_drain() -> None:
    class SwitchOnce:
        """Implements `ScalingPolicy`."""

        def decide(self, signals: ScalingSignals) -> ScalingDecision:
            count = {"prefill": len(signals.prefill), "decode": len(signals.decode)}
            actions: tuple[ScalingAction, ...] = ()
            if 100 <= signals.at_s < 105:
                busiest = max(signals.prefill, key=lambda worker: worker.num_sequences).worker
                actions = (ScalingAction(kind="switch", pool="prefill", worker=busiest, to_pool="decode"),)
            return ScalingDecision(at_s=signals.at_s, targets=count, needed=count, actions=actions)

    traffic = requests()
    outcome = scaled(SwitchOnce(), traffic, prefill=3, decode=1)
    assert outcome.result.num_finished == len(traffic)
    ready = [(at_s, prefill, decode) for at_s, prefill, decode, _ in outcome.samples]
    assert ready[0][1:] == (3, 1)
    assert ready[-1][1:] == (2, 2)
    switched_s = next(at_s for at_s, _, decode in ready if decode == 2)
    assert switched_s - 100 >= TIMES.switch_s
    assert outcome.gpu_s == pytest.approx(4 * traffic[-1].arrival_s)


def test_starts_beyond_the_budget_do_not_happen() -> None:
    class Greedy:
        """Implements `ScalingPolicy`."""

        def decide(self, signals: ScalingSignals) -> ScalingDecision:
            wants = ScalingAction(kind="start", pool="decode")
            return ScalingDecision(at_s=signals.at_s, targets={}, needed={}, actions=(wants,) * 3)

    short = [dataclasses.replace(request, osl=2) for request in requests(duration_s=60.0)]
    outcome = scaled(Greedy(), short, max_gpus=4)
    assert outcome.max_gpus == 4
    assert outcome.num_actions["start"] == 2
