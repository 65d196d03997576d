"""Looks for garbage at moments of our choosing: where an automatic collection falls, everybody's token waits for it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

_WORTH_IT = 100  # new objects; the automatic collector waits for 700 or more, and a prompt's lists make those long
_WHOLE_EVERY_S = 10.0


class Garbage:
    """The process's, as the collector is. Call `collect` often: then that hardly ever finds enough to begin by itself.

    Args: clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._whole_s = clock()  # when all that is not frozen was gone through last

    def collect(self) -> None:
        """Now nobody waits: go through what was made since the last time, and now and then through everything."""
        if gc.get_count()[0] < _WORTH_IT:
            return
        if (now := self._clock()) - self._whole_s >= _WHOLE_EVERY_S:
            self._whole_s = now
            gc.collect()
        else:
            gc.collect(1)


garbage = Garbage()
