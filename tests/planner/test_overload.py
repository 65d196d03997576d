"""More load than a simulated cluster can carry: admission keeps its goodput, and one tenant's flood is its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from splitserve.planner.simulator import RouterLimits, simulate
from splitserve.planner.traffic import SyntheticTraffic, fixed_lengths, spread_lengths
from splitserve.planner.types import ClusterSpec, SimRequest, Slo

from .clusters import LinearLatency, cluster, pool

# One prefill worker computes 10,000 tokens/s; a decode step takes 10 ms and half a millisecond a sequence.
LATENCY = LinearLatency(step_s=0.010, prefill_token_s=1e-4, decode_sequence_s=5e-4)
SLO = Slo(ttft_s=1.0, tpot_s=0.030)
REFUSE = RouterLimits(admission="refuse", ttft_target_s=SLO.ttft_s, tpot_target_s=SLO.tpot_s)
QUEUE = RouterLimits(admission="queue")


def two_pools() -> ClusterSpec:
    return cluster(pool(LATENCY), pool(LATENCY, num_workers=2), router_s=0.002)


def traffic(rate: float, num_requests: int, *, osl: int = 40) -> list[SimRequest]:
    return SyntheticTraffic(rate=rate, isl=spread_lengths(1000, 0.5), osl=fixed_lengths(osl)).generate(num_requests)


def test_goodput_at_twice_the_capacity_is_that_at_capacity() -> None:
    at_capacity = simulate(two_pools(), traffic(8.5, 500), limits=REFUSE)
    beyond = simulate(two_pools(), traffic(17.0, 1_000), limits=REFUSE)
    assert at_capacity.met(SLO).mean() > 0.9
    assert beyond.goodput(SLO) > 0.9 * at_capacity.goodput(SLO)
    assert set(beyond.errors) == {"overloaded"}
    served = beyond.ttft_s[np.isfinite(beyond.ttft_s)]
    assert (served <= SLO.ttft_s).mean() > 0.95  # hardly any work was for nothing


def test_a_limit_on_tokens_is_kept_where_decode_is_the_bottleneck() -> None:
    """Each decode worker has room for 40 sequences within 30 ms; the answers are long."""
    long_answers = traffic(8.0, 400, osl=600)
    kept = simulate(two_pools(), long_answers, limits=REFUSE)
    queued = simulate(two_pools(), long_answers, limits=QUEUE)
    assert kept.goodput(SLO) > 2 * queued.goodput(SLO)
    assert (kept.tpot_s[np.isfinite(kept.tpot_s)] <= SLO.tpot_s).mean() > 0.9


def test_a_burst_costs_what_is_refused_and_not_what_comes_after_it() -> None:
    calm, burst = traffic(5.0, 300), traffic(50.0, 1_000)
    requests = [*calm, *(replace(request, arrival_s=request.arrival_s + 20.0) for request in burst)]
    counts = np.array([request.arrival_s >= 20.0 for request in requests])
    met = {
        name: int((simulate(two_pools(), requests, limits=limits).met(SLO) & counts).sum())
        for name, limits in (("refuse", REFUSE), ("queue", QUEUE))
    }
    assert met["refuse"] > 2 * met["queue"]


def test_the_flood_of_one_tenant_leaves_the_others_their_share() -> None:
    """A light tenant asks for a tenth of what there is, a heavy one for three times that."""
    light = [replace(request, tenant="light") for request in traffic(1.0, 60)]
    heavy = [replace(request, tenant="heavy") for request in traffic(30.0, 1_800)]
    met = simulate(two_pools(), [*light, *heavy], limits=REFUSE).met(SLO)
    as_one = [replace(request, tenant="heavy") for request in light]
    mixed = simulate(two_pools(), [*as_one, *heavy], limits=REFUSE).met(SLO)
    assert met[:60].mean() > 0.95
    assert met[60:].sum() / 60 > 0.8 * 9.0  # and what is left is not kept free
    assert mixed[:60].mean() < 0.7


def test_an_important_request_passes_the_queue() -> None:
    requests = [replace(request, priority=int(number % 10 == 0)) for number, request in enumerate(traffic(20.0, 600))]
    met = simulate(two_pools(), requests, limits=REFUSE).met(SLO)
    assert met[::10].mean() > 0.95
    assert met.mean() < 0.7
