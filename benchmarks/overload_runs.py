"""Traffic of the overload benchmark, and how its runs are counted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BURST_FROM_S, BURST_S, BURST_END_S = 10.0, 20.0, 60.0  # the last: of the time that counts, which begins with the burst
BURST_FACTOR = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one request."""

    arrival_s: float
    met: bool  # within the service level
    refused: bool  # with a typed, retryable error
    ttft_s: float  # inf without a first token


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The requests that arrived in the time that counts."""

    offered_rps: float
    goodput_rps: float
    met: float  # share
    refused: float  # share
    ttft_p90_s: float  # of those that were served


def count(outcomes: Sequence[Outcome], from_s: float, until_s: float) -> Measured:
    rows = [row for row in outcomes if from_s <= row.arrival_s < until_s]
    served = [row.ttft_s for row in rows if row.ttft_s < float("inf")]
    met = sum(row.met for row in rows)
    return Measured(
        offered_rps=len(rows) / (until_s - from_s),
        goodput_rps=met / (until_s - from_s),
        met=met / max(1, len(rows)),
        refused=sum(row.refused for row in rows) / max(1, len(rows)),
        ttft_p90_s=float(np.percentile(served, 90)) if served else float("inf"),
    )


def poisson_times(rate: float, seconds: float, seed: int, start_s: float = 0.0) -> list[float]:
    """Arrivals in [start_s, start_s + seconds)."""
    rng, times, at_s = random.Random(seed), list[float](), start_s
    while (at_s := at_s + rng.expovariate(rate)) < start_s + seconds:
        times.append(at_s)
    return times


def burst_times(rate: float, seed: int) -> list[float]:
    """At `rate`, but for a burst of ten times that."""
    after_s = BURST_FROM_S + BURST_S
    return [
        *poisson_times(rate, BURST_FROM_S, seed),
        *poisson_times(BURST_FACTOR * rate, BURST_S, seed + 1, BURST_FROM_S),
        *poisson_times(rate, BURST_END_S - after_s, seed + 2, after_s),
    ]
