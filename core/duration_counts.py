"""Durations counted in buckets that grow by a tenth: cheap to keep, send and subtract, and good for percentiles."""

from __future__ import annotations

import math
from collections.abc import Sequence

_FIRST_S = 1e-3
_GROWTH = 1.1
NUM_BUCKETS = 140  # up to 600 s


class DurationCounts:
    """Counts since the start; the difference of two readings tells of the time between."""

    def __init__(self) -> None:
        self._counts = [0] * NUM_BUCKETS

    def add(self, seconds: float) -> None:
        self._counts[bucket_of(seconds)] += 1

    @property
    def counts(self) -> Sequence[int]:
        """One for each bucket."""
        return self._counts


def bucket_of(seconds: float) -> int:
    if seconds <= _FIRST_S:
        return 0
    return min(NUM_BUCKETS - 1, math.ceil(math.log(seconds / _FIRST_S, _GROWTH) - 1e-9))


def percentile_s(counts: Sequence[int], percent: float) -> float | None:
    """Upper end of the bucket in which the percentile lies, at most a tenth too large; None if nothing was counted."""
    wanted = math.ceil(sum(counts) * percent / 100)
    if not wanted:
        return None
    seen = 0
    for bucket, count in enumerate(counts):
        seen += count
        if seen >= wanted:
            return float(_FIRST_S * _GROWTH**bucket)
    raise AssertionError("a percentile is at most 100")
