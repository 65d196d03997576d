"""Percentiles of counted durations: never too small, at most a tenth too large."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from splitserve.core.duration_counts import NUM_BUCKETS, DurationCounts, percentile_s


@given(st.lists(st.floats(0.001, 500.0), min_size=1, max_size=50), st.sampled_from([1.0, 50.0, 90.0, 99.0, 100.0]))
def test_a_percentile_is_at_most_a_tenth_too_large(seconds: list[float], percent: float) -> None:
    counted = DurationCounts()
    for each in seconds:
        counted.add(each)
    exact = float(np.percentile(seconds, percent, method="inverted_cdf"))
    found = percentile_s(counted.counts, percent)
    assert found is not None
    assert exact * (1 - 1e-6) <= found <= exact * 1.1 * (1 + 1e-6)


def test_what_is_beyond_the_buckets_is_in_the_last_one() -> None:
    counted = DurationCounts()
    counted.add(1e9)
    counted.add(0.0)
    assert (counted.counts[0], counted.counts[NUM_BUCKETS - 1]) == (1, 1)


def test_nothing_counted_has_no_percentile() -> None:
    assert percentile_s([0] * NUM_BUCKETS, 90.0) is None
    assert percentile_s([], 90.0) is None


def test_percentages_are_of_what_was_counted() -> None:
    counted = DurationCounts()
    for seconds in (0.01, 0.02, 0.03, 0.04):
        counted.add(seconds)
    assert percentile_s(counted.counts, 50.0) == pytest.approx(0.02, rel=0.1)
