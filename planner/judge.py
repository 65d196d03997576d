"""A cluster tried on the user's traffic: the simulator's result as an outcome."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from .closed_form import PERCENTILES, estimate
from .load import Load
from .outcome import Outcome, missed_limits
from .simulator import simulate
from .types import ClusterSpec, SimRequest, Slo


def simulated_outcome(cluster: ClusterSpec, requests: Sequence[SimRequest], slo: Slo, *, seed: int = 0) -> Outcome:
    """Simulate, and hold the result against the limits."""
    result = simulate(cluster, requests, seed=seed)
    percentiles = sorted({*PERCENTILES, slo.percentile})

    def figures(quantity: str) -> dict[float, float]:
        values = {percentile: result.percentile(quantity, percentile) for percentile in percentiles}
        return {percentile: value for percentile, value in values.items() if not math.isnan(value)}

    utilisation = dict(result.utilisation)
    if cluster.prefill is not None:
        utilisation["link"] = result.link_utilisation
    # A worker that decodes is always busy: what is told of it is the share of the tokens that it could make.
    load = Load.of(requests, prefix_cache=cluster.prefix_cache)
    capacity = estimate(cluster, load).utilisation
    utilisation |= {pool: capacity[pool] for pool in ("decode", "colocated") if pool in capacity}
    outcome = Outcome(
        method="simulation",
        ttft_s=figures("ttft"),
        tpot_s=figures("tpot"),
        itl_s=figures("itl"),
        goodput_rps=result.goodput(slo),
        utilisation=utilisation,
        meets_slo=False,
        missed="",
        preemptions=result.num_preemptions,
    )
    missed = missed_limits(outcome, slo, slo.percentile)
    if result.errors:
        failed = ", ".join(f"{count:,} x {code}" for code, count in sorted(result.errors.items()))
        missed = f"{missed}; failed: {failed}" if missed else f"failed: {failed}"
    return replace(outcome, missed=missed, meets_slo=not missed)
