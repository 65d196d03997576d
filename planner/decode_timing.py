"""How long a run of decode steps takes, without asking the latency model for each of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .types import LatencyModel

_TOLERANCE = 1e-3  # of a step's time, by which it may miss the straight line between first and last step


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTiming:
    """Steps whose times grow evenly."""

    num_steps: int
    first_step_s: float
    growth_s: float  # from one step to the next

    @property
    def last_step_s(self) -> float:
        return self.step_s(self.num_steps - 1)

    @property
    def total_s(self) -> float:
        return self.elapsed_s(self.num_steps)

    def step_s(self, index: int) -> float:
        return self.first_step_s + self.growth_s * index

    def elapsed_s(self, num_steps: int) -> float:
        """Time of the first `num_steps` steps."""
        return num_steps * (self.first_step_s + self.growth_s * (num_steps - 1) / 2)

    def steps_within(self, elapsed_s: float) -> int:
        """Steps that have ended by then, of all but the last."""
        first, half = self.first_step_s - self.growth_s / 2, self.growth_s / 2
        # The positive root of half * k^2 + first * k = elapsed, in the form that also holds for half = 0.
        root = first + math.sqrt(max(0.0, first * first + 4 * half * elapsed_s))
        count = min(max(int(2 * elapsed_s / root), 0), self.num_steps - 1) if root > 0 else self.num_steps - 1
        while count > 0 and self.elapsed_s(count) > elapsed_s:
            count -= 1
        while count < self.num_steps - 1 and self.elapsed_s(count + 1) <= elapsed_s:
            count += 1
        return count


def time_run(latency: LatencyModel, *, num_steps: int, batch: int, context_tokens: int) -> RunTiming:
    """Timing of the longest beginning of a run over which the model is straight; `num_steps` may be less than asked."""

    def step_s(index: int) -> float:
        return latency.decode_step_s(batch, context_tokens + index * batch)

    first_s = step_s(0)
    while num_steps > 1:
        growth_s = (step_s(num_steps - 1) - first_s) / (num_steps - 1)
        middle = (num_steps - 1) // 2
        expected_s = first_s + growth_s * middle
        if num_steps == 2 or abs(step_s(middle) - expected_s) <= _TOLERANCE * expected_s:
            return RunTiming(num_steps=num_steps, first_step_s=first_s, growth_s=growth_s)
        num_steps //= 2
    return RunTiming(num_steps=1, first_step_s=first_s, growth_s=0.0)
