"""Looks for garbage at moments of our choosing: where an automatic collection falls, everybody's token waits for it."""

from __future__ import annotations

import gc

_WORTH_IT = 100  # new objects; the automatic collector waits for 700 or more, and a prompt's lists make those long


def collect_young() -> None:
    """Go through what was made of late, now that nobody waits. What was made long ago is left to the collector."""
    if gc.get_count()[0] >= _WORTH_IT:
        gc.collect(1)
