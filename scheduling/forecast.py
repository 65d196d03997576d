"""What a rate will be a little later: Holt's linear trend with damping, for samples at uneven times."""

from __future__ import annotations

import math

_MAX_GROWTH = 2.0  # times the level; no forecast of a minute goes beyond


class TrendForecast:
    """A level and a trend, each an exponential average.

    A trend below twice the level's own standard error counts as noise: only what exceeds it is extrapolated, and the
    further ahead, the less of it.

    Args:
        level_s: time constant of the level.
        trend_s: of the trend.
        damping_s: a trend goes on for about so long.
    """

    def __init__(self, *, level_s: float = 15.0, trend_s: float = 30.0, damping_s: float = 60.0) -> None:
        self.level = 0.0
        self.trend = 0.0  # per second
        self._level_s = level_s
        self._trend_s = trend_s
        self._damping_s = damping_s
        self._variance = 0.0  # of what the next sample differs from its expectation
        self._weight = 1.0  # of the newest sample in the level
        self._started = False

    def observe(self, value: float, elapsed_s: float) -> None:
        """A sample, `elapsed_s` after the one before."""
        if not self._started:
            self.level, self._started = value, True
            return
        if elapsed_s <= 0:
            return
        self._weight = 1 - math.exp(-elapsed_s / self._level_s)
        expected = self.level + self.trend * elapsed_s
        surprise = value - expected
        before = self.level
        self.level = max(0.0, expected + self._weight * surprise)
        self._variance += (1 - math.exp(-elapsed_s / self._trend_s)) * (surprise**2 - self._variance)
        slope = (self.level - before) / elapsed_s
        self.trend += (1 - math.exp(-elapsed_s / self._trend_s)) * (slope - self.trend)

    def ahead(self, horizon_s: float) -> float:
        """The value expected `horizon_s` from the last sample; never negative, at most twice the level."""
        gain = self.trend * self._damping_s * (1 - math.exp(-horizon_s / self._damping_s))
        noise = 2 * math.sqrt(self._variance * self._weight / (2 - self._weight))
        gain = math.copysign(max(0.0, abs(gain) - noise), gain)
        return min(max(0.0, self.level + gain), _MAX_GROWTH * self.level)
