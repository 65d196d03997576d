"""Traffic in the few figures that the closed form needs: rate, burstiness, and quantiles of lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .fitting import Array
from .types import SimRequest

_NUM_QUANTILES = 32  # equal parts of the prompts, each one by its mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Traffic in figures. `isl` and `cached` are means of equal parts of the prompts, shortest first."""

    rate: float  # requests/s
    arrival_cv: float  # of the gaps between arrivals; 1 is Poisson
    isl: Array
    cached: Array  # of those tokens, what a prefix cache that forgets nothing would hold
    mean_osl: float
    resident_context: float  # mean context of a running sequence, over time: long answers count for longer
    resident_peak: float  # mean of its largest context

    @property
    def mean_isl(self) -> float:
        return float(self.isl.mean())

    @classmethod
    def of(cls, requests: Sequence[SimRequest], *, prefix_cache: bool) -> Load:
        """The figures of a trace of at least two requests."""
        arrivals = np.sort([request.arrival_s for request in requests])
        gaps = np.diff(arrivals)
        mean_gap = float(gaps.mean()) or 1e-9
        isl = np.array([float(request.isl) for request in requests])
        osl = np.array([float(request.osl) for request in requests])
        cached = np.array(cached_tokens(requests) if prefix_cache else [0.0] * len(requests))
        order = np.argsort(isl, kind="stable")
        num_kinds = len(set(zip(isl.tolist(), cached.tolist(), strict=True)))
        parts = np.array_split(order, min(_NUM_QUANTILES, num_kinds))
        weights = np.maximum(osl - 1, 1e-9)  # the first token comes from prefill
        return cls(
            rate=1 / mean_gap,
            arrival_cv=float(gaps.std()) / mean_gap,
            isl=np.array([isl[part].mean() for part in parts]),
            cached=np.array([cached[part].mean() for part in parts]),
            mean_osl=float(osl.mean()),
            resident_context=float(np.average(isl + osl / 2, weights=weights)),
            resident_peak=float(np.average(isl + osl, weights=weights)),
        )

    def at(self, rate: float) -> Load:
        return replace(self, rate=rate)

    def with_prompts(self, factor: float) -> Load:
        """The same traffic with prompts `factor` times as long."""
        longer = (factor - 1) * self.mean_isl
        return replace(
            self,
            isl=self.isl * factor,
            cached=self.cached * factor,
            resident_context=self.resident_context + longer,
            resident_peak=self.resident_peak + longer,
        )


def cached_tokens(requests: Sequence[SimRequest]) -> list[float]:
    """Prompt tokens of each request that earlier ones began with, if nothing was ever evicted."""
    seen: set[tuple[int, int]] = set()
    found = []
    for request in requests:
        hits = 0
        for place, block in enumerate(request.hash_ids):
            if (place, block) not in seen:
                break
            hits += 1
        found.append(float(min(hits * request.hash_block_tokens, request.isl - 1)))
        seen.update(enumerate(request.hash_ids))
    return found
