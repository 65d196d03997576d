"""Looks for garbage at moments of our choosing: where an automatic collection falls, everybody's token waits for it."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

_WORTH_IT = 100  # new objects; the automatic collector waits for 700 or more, and a prompt's lists make those long
_LOOK_S = 10.0
_IDLE_S = 2.0  # without a call; a worker calls after each step, and steps of long prompts take a while
_WHOLE_AT_LATEST_S = 60.0  # a busy worker's old garbage is half a KiB a request


class Garbage:
    """The process's, as the collector is. Call `collect` often: then that hardly ever finds enough to begin by itself.

    Going through everything takes tens of milliseconds, so that waits until nobody has called for a while.

    Args: clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._called_s = self._whole_s = clock()  # when nothing old was left to be gone through, last

    def take_over(self) -> None:
        """On the event loop, once all is loaded: that stays. Of the rest, the collector by itself goes through new
        objects from now on, and we through the old ones."""
        gc.collect()
        gc.freeze()
        young, middle, _ = gc.get_threshold()
        gc.set_threshold(young, middle, 1 << 30)
        self._look_later()

    def collect(self) -> None:
        """For a moment nobody waits: go through what was made since the last time."""
        self._called_s = self._clock()
        if gc.get_count()[0] >= _WORTH_IT:
            gc.collect(1)

    def _look_later(self) -> None:
        asyncio.get_running_loop().call_later(_LOOK_S, self._look)

    def _look(self) -> None:
        self._look_later()
        now = self._clock()
        num_aged = gc.get_count()[2]  # collections that left old objects behind
        if num_aged and now < min(self._called_s + _IDLE_S, self._whole_s + _WHOLE_AT_LATEST_S):
            return
        self._whole_s = now
        if num_aged:
            gc.collect()


garbage = Garbage()
