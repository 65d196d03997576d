"""A rate and its trend: what is expected a little later."""

from __future__ import annotations

import pytest
from splitserve.scheduling.forecast import TrendForecast


def observed(*rates: float) -> TrendForecast:
    """A rate a second."""
    forecast = TrendForecast()
    for rate in rates:
        forecast.observe(rate, 1.0)
    return forecast


def test_a_steady_rise_is_expected_to_go_on() -> None:
    rising = observed(*(10.0 + second for second in range(60)))
    assert rising.ahead(20.0) > rising.level > 50.0


def test_one_burst_does_not_pull_down_what_comes_after_it() -> None:
    after = observed(70.0, *[5.0] * 40)
    assert min(observed(70.0, *[5.0] * seconds).level for seconds in range(1, 40)) >= 5.0
    assert after.level == pytest.approx(5.0, rel=0.1)


def test_a_rate_that_stopped_and_came_back_is_seen_at_once() -> None:
    """The fall to nothing does not pull down what comes after it."""
    again = observed(*[3_000.0] * 30, *[0.0] * 30, *[100.0] * 10)
    assert again.level == pytest.approx(100.0, rel=0.5)
