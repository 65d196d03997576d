"""Arrival times of a trace that were rounded when they were recorded, as Mooncake's are to 3 s."""

from __future__ import annotations

from collections.abc import Sequence

_CROWDED = 1.5  # requests per distinct time, from which the times are taken to be rounded


def spread_times(times_s: Sequence[float], seed: int) -> tuple[list[float], float]:
    """Each time at random within its bin, where all at its start would be bursts that nobody sent; and the bin, s.

    Where times are not rounded they stay, and the bin is 0.
    """
    import numpy as np  # not by whoever only asks for --help

    distinct = sorted(set(times_s))
    if len(distinct) < 2 or len(times_s) < _CROWDED * len(distinct):
        return list(times_s), 0.0
    bin_s = float(np.round(np.median(np.diff(distinct)), 1))
    if bin_s <= 0:
        return list(times_s), 0.0
    offsets = np.random.default_rng(seed).uniform(0, bin_s, len(times_s))
    return [time_s + float(offset) for time_s, offset in zip(times_s, offsets, strict=True)], bin_s


def spread_note(name: str, bin_s: float) -> str:
    """For the reader of results."""
    return f"{name}: timestamps are rounded to {bin_s:g} s; arrivals were spread at random within these bins"
