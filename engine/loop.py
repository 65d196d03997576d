"""The device loop: the one thread that runs an engine's steps."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from .engine import Engine
from .outputs import StepOutput

logger = logging.getLogger(__name__)

_RECENT = 64  # steps that tell how long one takes
_SLOW = 5.0  # times the slowest of them: no bound is shorter
_FIRST, _WARM_UP = 4.0, 75.0  # times the bound: until the first step ended, and before that the warm-up


class DeviceLoop:
    """Steps the engine while there is work and sleeps on a condition when there is none.

    A step that raises fails its sequences and frees their blocks; the loop goes on. Where even that raises, or what
    comes before the first step, the loop ends and counts as stalled from then on.
    """

    def __init__(self, engine: Engine, on_step: Callable[[StepOutput], None]) -> None:
        self._engine = engine
        self._on_step = on_step
        self._condition = threading.Condition()
        self._woken = False
        self._stopping = False
        self._idle = True  # nothing can go on until somebody wakes us
        self._progress_s = time.monotonic()  # when the last step ended
        self._warm = False
        self._ended = False  # by an error
        self._recent_s: deque[float] = deque(maxlen=_RECENT)  # what steps took of late
        self._thread = threading.Thread(target=self._run, name="device-loop", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There is new work, or blocks were freed that waiting work may need."""
        with self._condition:
            if self._idle:
                self._progress_s = time.monotonic()  # the bound of `stalled` counts from here
                self._idle = False
            self._woken = True
            self._condition.notify()

    def stop(self) -> None:
        """End the thread after its current step."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def ended(self) -> bool:
        """Whether an error ended the thread, so that nothing can go on."""
        return self._ended

    def stalled(self, bound_s: float) -> bool:
        """Whether work is queued and no step finished within the bound: alive means progress.

        The bound is wider while the first steps compile what they need, and where steps take long anyway.
        """
        with self._condition:
            if self._ended:
                return True
            if not self._recent_s:
                bound_s *= _FIRST if self._warm else _WARM_UP
            else:
                bound_s = max(bound_s, _SLOW * max(self._recent_s))
            return not self._idle and time.monotonic() - self._progress_s > bound_s

    def _run(self) -> None:
        try:
            self._work()
        except Exception:
            logger.critical("the device loop ended: no step follows", exc_info=True)
            with self._condition:
                self._ended = True

    def _work(self) -> None:
        self._engine.warm_up()
        with self._condition:
            self._warm = True
            self._progress_s = time.monotonic()
        while self._wait():
            began_s = time.monotonic()
            output = self._step()
            with self._condition:
                self._progress_s = time.monotonic()
                if output is not None:
                    self._recent_s.append(self._progress_s - began_s)
                self._idle = output is None and not self._woken
                self._woken = self._woken or output is not None
            if output is not None:
                try:
                    self._on_step(output)
                except Exception:
                    logger.exception("handling a step's output failed")

    def _wait(self) -> bool:
        """Sleep until there may be work; False when the loop is to end."""
        with self._condition:
            while not (self._woken or self._stopping):
                self._condition.wait()
            self._woken = False
            return not self._stopping

    def _step(self) -> StepOutput | None:
        try:
            return self._engine.step()
        except Exception as error:
            logger.exception("an engine step failed")
            return self._engine.abandon_step(error)
