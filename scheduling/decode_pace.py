"""How many sequences a decode worker can hold within a limit on its step: a line through what it reported."""

from __future__ import annotations

_WEIGHT = 0.1  # of the newest report in the averages
_MIN_SPREAD = 0.01  # of the square of the mean batch: less than that tells no slope


class DecodePace:
    """Step time over batch size, fitted by least squares with old reports fading out.

    Args: limit_s: the longest step that new sequences may bring about; None: any.
    """

    def __init__(self, limit_s: float | None) -> None:
        self._limit_s = limit_s
        self._batch = self._step_s = self._variance = self._covariance = 0.0  # moving
        self._known = False

    def report(self, batch: int, step_s: float) -> None:
        """A recent step took so long with so many sequences."""
        if self._limit_s is None or batch < 1 or step_s <= 0:
            return
        if not self._known:
            self._batch, self._step_s, self._known = float(batch), step_s, True
            return
        d_batch, d_step = batch - self._batch, step_s - self._step_s
        self._batch += _WEIGHT * d_batch
        self._step_s += _WEIGHT * d_step
        self._variance += _WEIGHT * ((1 - _WEIGHT) * d_batch * d_batch - self._variance)
        self._covariance += _WEIGHT * ((1 - _WEIGHT) * d_batch * d_step - self._covariance)

    def has_room(self, batch: int) -> bool:
        """Whether a step with one sequence more than `batch` would stay within the limit."""
        return self._limit_s is None or batch < 1 or not self._known or self.step_s(batch + 1) <= self._limit_s

    def step_s(self, batch: float) -> float:
        """Of a step with that many sequences; a step never costs more than in proportion, nor less with more."""
        steepest = self._step_s / self._batch
        slope = steepest / 2
        if self._variance > _MIN_SPREAD * self._batch * self._batch:
            slope = min(max(self._covariance / self._variance, 0.0), steepest)
        return self._step_s + slope * (batch - self._batch)
