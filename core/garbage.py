"""Looks for garbage at moments of our choosing: where an automatic collection falls, everybody's token waits for it."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

_WORTH_IT = 100  # new objects; the automatic collector waits for 700 or more, and a prompt's lists make those long
_IDLE_S = 0.2  # without a call
_WHOLE_EVERY_S = 10.0
_WHOLE_AT_LATEST_S = 600.0


class Garbage:
    """The process's, as the collector is. Call `collect` often: then that hardly ever finds enough to begin by itself.

    Going through everything takes tens of milliseconds, so that waits until nobody has called for a while.

    Args: clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._called_s = self._whole_s = clock()  # when all that is not frozen was gone through last
        self._timer: asyncio.TimerHandle | None = None

    def collect(self) -> None:
        """On the event loop; for a moment nobody waits: go through what was made since the last time."""
        self._called_s = now = self._clock()
        if gc.get_count()[0] < _WORTH_IT:
            return
        if now - self._whole_s >= _WHOLE_AT_LATEST_S:
            self._collect_all()
            return
        gc.collect(1)
        if self._timer is None:
            self._look_again(_WHOLE_EVERY_S)

    def _look_again(self, after_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(after_s, self._when_idle)

    def _when_idle(self) -> None:
        self._timer = None
        if (wait_s := self._called_s + _IDLE_S - self._clock()) > 0:
            self._look_again(wait_s)
        else:
            self._collect_all()

    def _collect_all(self) -> None:
        self._whole_s = self._clock()
        gc.collect()


garbage = Garbage()
