"""The simulator's clock: actions at times, in order of time, then of who asked first."""

from __future__ import annotations

import heapq
from collections.abc import Callable

Action = Callable[[], object]


class EventQueue:
    """Runs one action after the other; an action may ask for more. Nothing is ever taken back."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Action]] = []
        self._num_asked = 0  # ties go to the earlier one, so that a run repeats exactly

    def at(self, time_s: float, action: Action) -> None:
        """Run `action` at `time_s`, at once if that is past."""
        self._num_asked += 1
        heapq.heappush(self._heap, (max(time_s, self.now_s), self._num_asked, action))

    def run(self) -> None:
        """Until nothing is left to do."""
        heap = self._heap
        while heap:
            self.now_s, _, action = heapq.heappop(heap)
            action()
