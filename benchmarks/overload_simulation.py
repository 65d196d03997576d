"""The overload benchmark by simulation: 2 prefill and 2 decode workers with an H200 each, Llama 3.1 8B."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..planner.gpus import load_gpu
from ..planner.models import load_model
from ..planner.question import Question, Role, worker_choices
from ..planner.simulator import RouterLimits, simulate
from ..planner.traffic import spread_lengths
from ..planner.types import ClusterSpec, PoolSpec, SimRequest, Slo
from .overload_runs import BURST_END_S, BURST_FROM_S, Measured, Outcome, burst_times, count, poisson_times

SLO = Slo(ttft_s=1.0, tpot_s=0.030, percentile=90.0)
ISL, OSL = spread_lengths(4000, 0.5), spread_lengths(300, 0.5)
BASE_LOAD = 0.5  # of the capacity, before and after the burst
POLICIES = {
    "refuse": RouterLimits(admission="refuse", ttft_target_s=SLO.ttft_s, tpot_target_s=SLO.tpot_s),
    "queue of 256": RouterLimits(admission="queue"),
    "endless queue": RouterLimits(admission="queue", max_queued=10**9, max_live=10**9),
}


def simulate_all(seconds: float, seed: int) -> tuple[float, dict[str, dict[str, Measured]], str]:
    """Capacity, the runs by traffic and policy, and what was simulated."""
    cluster = simulated_cluster()
    capacity = find_capacity(cluster, seconds, seed)
    traffic = {
        "capacity": (poisson_times(capacity, seconds, seed), 0.0, seconds),
        "2x capacity": (poisson_times(2 * capacity, seconds, seed), 0.0, seconds),
        "10x burst": (burst_times(BASE_LOAD * capacity, seed), BURST_FROM_S, BURST_END_S),
    }
    rows = {
        name: {policy: count(run(cluster, times, limits, seed), start, end) for policy, limits in POLICIES.items()}
        for name, (times, start, end) in traffic.items()
    }
    return capacity, rows, "2P2D, Llama 3.1 8B on H200, 4,000 tokens in, 300 out, TTFT 1 s, TPOT 30 ms"


def simulated_cluster() -> ClusterSpec:
    question = Question(
        model=load_model("llama-3.1-8b"),
        prefill_gpus=(load_gpu("h200"),),
        decode_gpus=(load_gpu("h200"),),
        requests=tuple(SimRequest(arrival_s=float(at_s), isl=4000, osl=300) for at_s in range(2)),
        slo=SLO,
        tp=(1,),
        chunk=8192,
        prefix_cache=False,
    )

    def pool(role: Role) -> PoolSpec:
        (choice,) = worker_choices(question, role)
        return PoolSpec(worker=choice.spec, num_workers=2)

    return ClusterSpec(
        prefill=pool("prefill"),
        decode=pool("decode"),
        kv_bytes_per_token=question.kv_bytes_per_token,
        link_bytes_per_s=question.link_bytes_per_s,
        link_latency_s=question.link_latency_s,
        router_s=question.router_s,
        prefix_cache=False,
    )


def find_capacity(cluster: ClusterSpec, seconds: float, seed: int) -> float:
    """The highest rate at which 90 % meet the service level, to 2 %; by bisection."""
    low, high = 0.5, 1.0
    while _met(cluster, high, seconds, seed) >= 0.9:
        low, high = high, 2 * high
    while high / low > 1.02:
        middle = (low + high) / 2
        if _met(cluster, middle, seconds, seed) >= 0.9:
            low = middle
        else:
            high = middle
    return low


def _met(cluster: ClusterSpec, rate: float, seconds: float, seed: int) -> float:
    outcomes = run(cluster, poisson_times(rate, seconds, seed), POLICIES["refuse"], seed)
    return count(outcomes, 0.0, seconds).met


def run(cluster: ClusterSpec, times: Sequence[float], limits: RouterLimits, seed: int) -> list[Outcome]:
    """One simulation."""
    prompts, answers = (np.random.default_rng([seed, stream]) for stream in range(2))
    lengths = zip(ISL.sample(prompts, len(times)), OSL.sample(answers, len(times)), strict=True)
    requests = [
        SimRequest(arrival_s=at_s, isl=int(isl), osl=int(osl)) for at_s, (isl, osl) in zip(times, lengths, strict=True)
    ]
    result = simulate(cluster, requests, limits=limits)
    met = result.met(SLO)
    return [
        Outcome(
            arrival_s=request.arrival_s,
            met=bool(met[index]),
            refused=bool(np.isinf(result.ttft_s[index])),
            ttft_s=float(result.ttft_s[index]),
        )
        for index, request in enumerate(requests)
    ]
