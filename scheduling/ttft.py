"""When a request would have its first token: predicted from what waits, what workers report, and past predictions."""

from __future__ import annotations

from collections.abc import Sequence

from .routing import PrefillLoad

_QUANTILE = 0.9  # of the errors of past predictions, that a prediction allows for
_STEP = 0.05  # of a TTFT, by which one error moves that quantile
_PACE_WEIGHT = 0.1  # of the newest dispatch in the averages


def start_wait_s(loads: Sequence[PrefillLoad], tokens_ahead: float) -> float:
    """Time until a prompt would start that has so many tokens before it in the queue.

    Workers run down what they have; whoever is through with it takes from the queue.

    Args: loads: of workers whose speed is known, at least one.
    """
    rate = done = now_s = 0.0
    for load in sorted(loads, key=lambda load: load.wait_s):
        if rate and done + (load.wait_s - now_s) * rate >= tokens_ahead:
            break
        done += (load.wait_s - now_s) * rate
        now_s = load.wait_s
        rate += load.tokens_per_s
    return now_s + max(0.0, tokens_ahead - done) / rate


class TtftPredictor:
    """Adds up the queue ahead, the workers' backlog and the prompt's own prefill, and learns how far off that is.

    Two estimates of the time in the queue, the longer of which counts: what the prefill workers have to compute, and
    the pace at which the queue has been moving, which knows of every other bottleneck (KV blocks and places in the
    batch of decode workers).
    """

    def __init__(self) -> None:
        self.margin_s = 0.0  # the 90th percentile of (measured - predicted)
        self._interval_s = 0.0  # between dispatches from a queue, on average
        self._cost = 0.0  # tokens of such a dispatch, on average
        self._last_from_queue_at: float | None = None  # None: nobody waited behind the last one

    def predict(self, loads: Sequence[PrefillLoad], tokens_ahead: float, cost: int) -> float | None:
        """Seconds until the first token, without the margin; None while no worker has told its speed."""
        known = [load for load in loads if load.tokens_per_s > 0]
        if not known:
            return None
        wait_s = start_wait_s(known, tokens_ahead)
        if self._cost and self._last_from_queue_at is not None:
            wait_s = max(wait_s, tokens_ahead / self._cost * self._interval_s)
        return wait_s + self.prefill_s(known, cost)

    @staticmethod
    def prefill_s(loads: Sequence[PrefillLoad], cost: int) -> float:
        """Of a prompt by itself; 0 while no worker has told its speed."""
        known = [load.tokens_per_s for load in loads if load.tokens_per_s > 0]
        return cost * len(known) / sum(known) if known else 0.0

    def dispatched(self, now: float, cost: int, num_queued: int) -> None:
        """A prompt left the queue for good, and so many are still there."""
        if self._last_from_queue_at is not None:
            interval_s = now - self._last_from_queue_at
            if not self._cost:
                self._interval_s, self._cost = interval_s, float(cost)
            self._interval_s += _PACE_WEIGHT * (interval_s - self._interval_s)
            self._cost += _PACE_WEIGHT * (cost - self._cost)
        self._last_from_queue_at = now if num_queued else None

    def emptied(self) -> None:
        """Nobody is in the queue, whoever was last left it by another way: what follows says nothing about its pace."""
        self._last_from_queue_at = None

    def measured(self, predicted_s: float, ttft_s: float) -> None:
        """How one prediction turned out. The margin rises nine times as fast as it falls: one in ten exceeds it."""
        step = _STEP * max(predicted_s, ttft_s)
        self.margin_s += step * (_QUANTILE if ttft_s - predicted_s > self.margin_s else _QUANTILE - 1)
