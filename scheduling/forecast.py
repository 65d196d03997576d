"""What a rate will be a little later: Holt's linear trend with damping, for samples at uneven times."""

from __future__ import annotations

import math

_MAX_GROWTH = 2.0  # times the level; no forecast of a minute goes beyond


class TrendForecast:
    """A level and a trend, each an exponential average.

    Only what a trend exceeds its own standard error by is extrapolated, and the further ahead, the less of it.

    Args:
        level_s: time constant of the level.
        trend_s: of the trend.
        damping_s: a trend goes on for about so long.
    """

    def __init__(self, *, level_s: float = 10.0, trend_s: float = 20.0, damping_s: float = 60.0) -> None:
        self.level = 0.0
        self.trend = 0.0  # per second
        self._level_s = level_s
        self._trend_s = trend_s
        self._damping_s = damping_s
        self._samples: tuple[float, ...] = ()  # the last three
        self._variance = 0.0  # of a sample about the trend
        self._elapsed_s = 0.0  # between samples

    def observe(self, value: float, elapsed_s: float) -> None:
        """A sample, `elapsed_s` after the one before."""
        if not self._samples:
            self.level, self._samples = value, (value,)
            return
        if elapsed_s <= 0:
            return
        before, expected = self.level, self.level + self.trend * elapsed_s
        self.level = max(0.0, expected + (1 - math.exp(-elapsed_s / self._level_s)) * (value - expected))
        slope, weight = (self.level - before) / elapsed_s, 1 - math.exp(-elapsed_s / self._trend_s)
        self.trend += weight * (slope - self.trend)
        self._elapsed_s += weight * (elapsed_s - self._elapsed_s) if self._elapsed_s else elapsed_s
        self._samples = (*self._samples[-2:], value)
        if self.level <= (least := min(self._samples)):  # after a step down a trend would go on below what is there
            self.level, self.trend = least, max(0.0, self.trend)
        if len(self._samples) == 3:  # second differences are of the noise alone: a straight line has none
            first, second, third = self._samples
            self._variance += weight * ((first - 2 * second + third) ** 2 / 6 - self._variance)

    def ahead(self, horizon_s: float) -> float:
        """The value expected `horizon_s` from the last sample; never negative, at most twice the level."""
        # As of a line through the samples of about both time constants.
        error = math.sqrt(12 * self._variance * self._elapsed_s / (self._level_s + self._trend_s) ** 3)
        trend = math.copysign(max(0.0, abs(self.trend) - error), self.trend)
        gain = trend * self._damping_s * (1 - math.exp(-horizon_s / self._damping_s))
        return min(max(0.0, self.level + gain), _MAX_GROWTH * self.level)
