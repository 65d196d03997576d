"""What a cluster does under the traffic: percentiles, goodput, utilisation, and whether that meets the limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from .candidates import Candidate
from .closed_form import PERCENTILES, Estimate, estimate
from .load import Load
from .question import Question
from .types import ClusterSpec, Slo

Method = Literal["closed form", "simulation"]
Figures = Mapping[float, float]  # seconds by percentile


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One cluster under one load."""

    method: Method
    ttft_s: Figures
    tpot_s: Figures
    itl_s: Figures
    goodput_rps: float
    utilisation: Mapping[str, float]
    meets_slo: bool
    missed: str  # the limits that are not met, empty if all are
    preemptions: int = 0
    details: Mapping[str, float] = field(default_factory=dict)


def closed_form_outcome(cluster: ClusterSpec, load: Load, slo: Slo) -> Outcome:
    """By formulas alone. Goodput counts the largest percentile at which all limits hold."""
    found = estimate(cluster, load)
    share = 0.0
    for percentile in (*PERCENTILES, slo.percentile):
        if not found.binding and not missed_limits(found, slo, percentile):
            share = max(share, percentile / 100)
    missed = found.binding or missed_limits(found, slo, slo.percentile)
    return Outcome(
        method="closed form",
        ttft_s=found.ttft_s,
        tpot_s=found.tpot_s,
        itl_s=found.itl_s,
        goodput_rps=load.rate * share,
        utilisation=found.utilisation,
        meets_slo=not missed,
        missed=missed,
    )


def missed_limits(found: Estimate | Outcome, slo: Slo, percentile: float) -> str:
    """The limits that are not met, as one line."""
    rows = (
        ("TTFT", slo.ttft_s, found.ttft_s),
        ("TPOT", slo.tpot_s, found.tpot_s),
        ("ITL", slo.itl_s, found.itl_s),
    )
    return ", ".join(
        f"{name} p{percentile:g} {value * 1e3:,.0f} ms against {limit * 1e3:,.0f}"
        for name, limit, values in rows
        if limit is not None and values and (value := at_percentile(values, percentile)) > limit
    )


def at_percentile(values: Figures, percentile: float) -> float:
    """Interpolated between the percentiles that are known."""
    if percentile in values:
        return values[percentile]
    known = sorted(values)
    for low, high in pairwise(known):
        if low < percentile < high:
            part = (percentile - low) / (high - low)
            return values[low] if math.isinf(values[high]) else values[low] + part * (values[high] - values[low])
    return values[known[0]] if percentile < known[0] else values[known[-1]]


def kv_gigabytes_per_s(candidate: Candidate, question: Question, rate: float) -> tuple[float, float]:
    """KV that moves in all, and over the busiest worker's link; 0 where nothing moves."""
    if candidate.prefill is None:
        return 0.0, 0.0
    total = rate * question.load.mean_isl * question.kv_bytes_per_token / 1e9
    return total, total / min(candidate.prefill.num_workers, candidate.decode.num_workers)
