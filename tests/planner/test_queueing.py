"""Queues with known answers: the simulator waits as theory says.

Two steps, since a simulated mean converges slowly: each simulated wait equals an independent recursion's to the last
digits, and the recursion's mean over a million requests is within 2 % of theory. `make verify` also compares the
simulator's own mean over 400,000 requests with theory.
"""

import heapq
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from splitserve.planner.simulator import RouterLimits, simulate
from splitserve.planner.types import ClusterSpec, SimRequest

from .clusters import LinearLatency, cluster, pool

MEAN_TOKENS = 1000
MEAN_S = 1.0  # of a service
LIMITS = RouterLimits(max_queued=10**9, max_live=10**9, prefill_bound_s=0.0)  # all wait in the router

QUEUES = [("M/D/1", 1, 0.7), ("M/M/1", 1, 0.7), ("M/D/c", 3, 0.8), ("M/M/c", 3, 0.8)]


def servers(count: int) -> ClusterSpec:
    """Prefill workers that take one prompt at a time; answers of one token whose KV weighs nothing."""
    one_by_one = LinearLatency(prefill_token_s=MEAN_S / MEAN_TOKENS)
    return cluster(
        pool(one_by_one, num_workers=count, num_blocks=10**6, max_step_tokens=10**9, max_running=1),
        pool(num_blocks=10**6, max_running=10**6),
        kv_bytes_per_token=0.0,
    )


def draw(kind: str, count: int, load: float, num_requests: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Arrivals, and prompt tokens that are fixed or exponential."""
    rng = np.random.default_rng(11)
    arrivals = np.cumsum(rng.exponential(MEAN_S / (load * count), num_requests))
    if kind.startswith("M/D"):
        return arrivals, np.full(num_requests, MEAN_TOKENS)
    return arrivals, np.maximum(1, np.rint(rng.exponential(MEAN_TOKENS, num_requests))).astype(np.int64)


def simulated_waits(kind: str, count: int, load: float, num_requests: int) -> NDArray[np.float64]:
    arrivals, tokens = draw(kind, count, load, num_requests)
    requests = [
        SimRequest(arrival_s=float(at_s), isl=int(isl), osl=1) for at_s, isl in zip(arrivals, tokens, strict=True)
    ]
    return simulate(servers(count), requests, limits=LIMITS).queue_s


def recursive_waits(arrivals: NDArray[np.float64], service_s: NDArray[np.float64], count: int) -> list[float]:
    """Kiefer and Wolfowitz: the next customer goes to the server that is free first."""
    free_at = [0.0] * count
    waits = []
    for at_s, service in zip(arrivals.tolist(), service_s.tolist(), strict=True):
        start_s = max(at_s, free_at[0])
        heapq.heapreplace(free_at, start_s + service)
        waits.append(start_s - at_s)
    return waits


def theory_wait_s(kind: str, count: int, load: float) -> float:
    """Mean time in the queue."""
    if kind.startswith("M/M"):  # Erlang's C formula
        offered = load * count
        below = sum(offered**k / math.factorial(k) for k in range(count))
        all_busy = offered**count / math.factorial(count) / (1 - load)
        return all_busy / (below + all_busy) * MEAN_S / (count * (1 - load))
    if count == 1:  # Pollaczek and Khinchine
        return load * MEAN_S / (2 * (1 - load))
    # Crommelin: after one service time all that were in service have left, and Poisson(load * count) have come.
    size = 400
    come = np.array([math.exp(-load * count + k * math.log(load * count) - math.lgamma(k + 1)) for k in range(size)])
    number = np.zeros(size)
    number[0] = 1.0
    for _ in range(2000):
        left = np.concatenate(([number[: count + 1].sum()], number[count + 1 :]))
        number = np.convolve(left, come)[:size]
        number /= number.sum()
    queued = (np.maximum(np.arange(size) - count, 0) * number).sum()
    return float(queued / (load * count)) * MEAN_S  # Little's law


def test_the_formulas_agree_where_they_meet() -> None:
    assert theory_wait_s("M/M/c", 1, 0.7) == pytest.approx(0.7 / 0.3)
    crommelin, pollaczek = theory_wait_s("M/D/c", 2, 1e-3), theory_wait_s("M/D/1", 1, 0.7)
    assert crommelin < 1e-5
    assert pollaczek == pytest.approx(theory_wait_s("M/M/1", 1, 0.7) / 2)


@pytest.mark.parametrize(("kind", "count", "load"), QUEUES)
def test_every_wait_equals_the_recursion(kind: str, count: int, load: float) -> None:
    arrivals, tokens = draw(kind, count, load, 3000)
    waits = recursive_waits(arrivals, tokens * (MEAN_S / MEAN_TOKENS), count)
    assert max(waits) > MEAN_S
    np.testing.assert_allclose(simulated_waits(kind, count, load, 3000), waits, atol=1e-6)


@pytest.mark.parametrize(("kind", "count", "load"), QUEUES)
def test_the_recursion_is_within_2_percent_of_theory(kind: str, count: int, load: float) -> None:
    arrivals, tokens = draw(kind, count, load, 1_000_000)
    waits = recursive_waits(arrivals, tokens * (MEAN_S / MEAN_TOKENS), count)
    assert np.mean(waits) == pytest.approx(theory_wait_s(kind, count, load), rel=0.02)


@pytest.mark.verify
@pytest.mark.parametrize(("kind", "count", "load"), QUEUES)
def test_the_simulator_is_within_2_percent_of_theory(kind: str, count: int, load: float) -> None:
    waits = simulated_waits(kind, count, load, 400_000)
    assert waits.mean() == pytest.approx(theory_wait_s(kind, count, load), rel=0.02)
