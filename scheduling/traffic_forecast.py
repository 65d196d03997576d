"""What traffic will be a little later: trends of the rates of requests and prompt tokens, and late mean lengths."""

from __future__ import annotations

import math

from .forecast import TrendForecast
from .pool_needs import Demand
from .scaling_signals import TrafficSignal

_LENGTHS_S = 60.0  # time constant of mean lengths


class TrafficForecast:
    """Holt trends of requests/s and prompt tokens/s; lengths are decaying means."""

    def __init__(self) -> None:
        self._requests = TrendForecast()
        self._tokens = TrendForecast()
        self._arrived = self._prefill = self._squared = self._cached = self._ended = self._output = 0.0

    @property
    def knows_output(self) -> bool:
        """Some answer has ended."""
        return self._ended > 0

    def observe(self, traffic: TrafficSignal, elapsed_s: float) -> None:
        """`elapsed_s` after the observation before."""
        if traffic.interval_s > 0:
            self._requests.observe(traffic.num_arrived / traffic.interval_s, elapsed_s)
            self._tokens.observe(traffic.prefill_tokens / traffic.interval_s, elapsed_s)
        keep = math.exp(-elapsed_s / _LENGTHS_S)
        self._arrived = self._arrived * keep + traffic.num_arrived
        self._prefill = self._prefill * keep + traffic.prefill_tokens
        self._squared = self._squared * keep + traffic.prefill_tokens_squared
        self._cached = self._cached * keep + traffic.cached_tokens
        self._ended = self._ended * keep + traffic.num_ended
        self._output = self._output * keep + traffic.output_tokens

    def demand(self, horizon_s: float) -> Demand | None:
        """The larger of now and `horizon_s` from now; None before the first request."""
        requests_per_s = max(self._requests.level, self._requests.ahead(horizon_s))
        tokens_per_s = max(self._tokens.level, self._tokens.ahead(horizon_s))
        if self._arrived <= 0:
            return None
        mean = self._prefill / self._arrived
        return Demand(
            requests_per_s=requests_per_s,
            prefill_tokens=tokens_per_s / requests_per_s if requests_per_s > 0 else mean,
            prefill_spread=math.sqrt(max(0.0, self._squared / self._arrived - mean**2)),
            cached_tokens=self._cached / self._arrived,
            output_tokens=self._output / self._ended if self.knows_output else 1.0,
        )
