"""What policies are worth, by simulation of traffic like two recorded ones: the same requests for each of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from splitserve.planner.published_traffic import published_traffic
from splitserve.planner.simulation_result import SimulationResult
from splitserve.planner.simulator import RouterLimits, simulate
from splitserve.planner.types import SimRequest, Slo
from splitserve.scheduling.policies.registry import load_policy

from .clusters import cluster, pool

SLO = Slo(ttft_s=2.0, tpot_s=0.05)


def traffic(name: str, count: int, rate: float) -> list[SimRequest]:
    requests = published_traffic(name, count, seed=1)
    factor = (count - 1) / (requests[-1].arrival_s - requests[0].arrival_s) / rate
    return [replace(request, arrival_s=request.arrival_s * factor) for request in requests]


def run(policy: str, requests: list[SimRequest]) -> SimulationResult:
    prefill, decode = pool(num_workers=6, num_blocks=50_000), pool(num_workers=2, num_blocks=100_000)
    spec = cluster(prefill, decode, prefix_cache=True)
    limits = RouterLimits(admission="queue", ttft_target_s=SLO.ttft_s)
    return simulate(spec, requests, policy=load_policy(policy), limits=limits)


def test_on_conversations_the_prefix_policy_answers_more_in_time_than_round_robin_and_computes_less() -> None:
    requests = traffic("mooncake", 900, 14.0)
    results = {policy: run(policy, requests) for policy in ("round_robin", "prefix")}
    cached = {policy: int(result.cached_tokens.sum()) for policy, result in results.items()}
    in_time = {policy: float(result.met(SLO).mean()) for policy, result in results.items()}
    assert cached["prefix"] > 1.5 * cached["round_robin"]
    assert in_time["prefix"] >= 1.05 * in_time["round_robin"]


@pytest.mark.parametrize("rate", [60.0, 110.0])
def test_on_prompts_that_share_nothing_it_is_no_worse(rate: float) -> None:
    requests = traffic("azure", 800, rate)
    in_time = {policy: float(run(policy, requests).met(SLO).mean()) for policy in ("round_robin", "prefix")}
    assert in_time["prefix"] >= 0.98 * in_time["round_robin"]
