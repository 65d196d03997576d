"""How the threads of one process share Python's interpreter."""

from __future__ import annotations

import ctypes
import sys

# A step loop, transfers and an event loop share one interpreter. Whoever comes back from a kernel launch or a read
# waits at most this long for it, and a step has dozens of them; less, and the event loop is held up in turn. With
# Python's 5 ms, one beside a busy event loop took longer than ten alone.
_SWITCH_INTERVAL_S = 1e-4
_SET_TIMER_SLACK, _SLACK_NS = 29, 1000  # prctl(2)


def share_interpreter() -> None:
    """Call it first in the main thread of a process whose threads wait for each other: later threads inherit it.

    Linux adds 50 us to each short wait unless told otherwise, that for the interpreter included.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_SET_TIMER_SLACK, _SLACK_NS, 0, 0, 0)
