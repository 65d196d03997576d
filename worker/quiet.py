"""When to do what can wait: after a step's tokens have left, and well before the next step ends.

A worker's threads share one interpreter. A grant for a long prompt or a part of its KV takes a millisecond of it; at a
step's end that millisecond is added to the gap between everybody's tokens, and in the middle of a step to nobody's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

from ..core.garbage import garbage

_LEAD_S = 2e-3  # before a step's end: the next one is planned in the last of them, and what began must be done by then
_LEAST_S = 3e-4  # how long it is quiet after each step, however short steps are
_PATIENCE_S = 0.01  # nothing waits for longer


class Quiet:
    """Of one worker; lives on its event loop.

    Args: clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begins = asyncio.Event()
        self._ends_s = 0.0
        self._next_end_s = 0.0  # of the step that runs

    def stepped(self, ended_s: float, took_s: float) -> None:
        """A step ended, after so long, and its messages are queued; the next one runs."""
        self._next_end_s = ended_s + took_s
        asyncio.get_running_loop().call_soon(self._begin)  # behind those who write the messages

    def _begin(self) -> None:
        garbage.collect()
        self._ends_s = max(self._next_end_s - _LEAD_S, self._clock() + _LEAST_S)
        self._begins.set()
        self._begins.clear()

    async def wait(self) -> None:
        """Until it is quiet: at once while no step runs, and after some milliseconds in any case."""
        until_s = self._clock() + _PATIENCE_S
        while (now := self._clock()) < until_s and self._ends_s <= now < self._next_end_s + _LEAD_S:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(until_s, self._next_end_s + _LEAD_S) - now):
                    await self._begins.wait()
