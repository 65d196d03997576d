"""The end of a worker that hangs: nothing inside it could go on, so whoever started it is to start it anew."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

EXIT_CODE = 4  # of a process that made no progress
LOOK_S = 1.0


class Watchdog:
    """Looks once a second, from a thread of its own, and ends the process when `stuck` gave a reason at every look of
    `patience_s`. The stacks of all threads go to the log first: they say where it hangs.

    Looks are counted, not seconds, so that a process that was stopped for a while has its time to recover.
    """

    def __init__(
        self,
        stuck: Callable[[], str],
        patience_s: float,
        *,
        end: Callable[[int], object] = os._exit,
        look_s: float = LOOK_S,
    ) -> None:
        self._stuck = stuck
        self._max_looks = max(1, round(patience_s / look_s))
        self._end = end
        self._look_s = look_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        looks = 0
        while not self._stopped.wait(self._look_s):
            reason = self._stuck()
            looks = looks + 1 if reason else 0
            if looks >= self._max_looks:
                logger.critical("this worker hangs and ends itself: %s; the stacks of its threads follow", reason)
                faulthandler.dump_traceback(all_threads=True)
                self._end(EXIT_CODE)
                return
