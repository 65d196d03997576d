"""Whether an event loop runs: it beats once a second, and whoever looks from another thread hears when it stopped."""

from __future__ import annotations

import asyncio
import time

_BEAT_S = 1.0


class Pulse:
    """Beats on the running event loop from `start` to `stop`. `silence` may be called from any thread."""

    def __init__(self, bound_s: float) -> None:
        self._bound_s = bound_s
        self._last_s = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._last_s = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(_BEAT_S, self.start)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def silence(self) -> str:
        """Why the loop counts as hanging; "" while it beats."""
        silent_s = time.monotonic() - self._last_s
        return f"the event loop has not run for {silent_s:.1f} s" if silent_s > self._bound_s + _BEAT_S else ""
