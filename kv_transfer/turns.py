"""Keeps two kinds of work of a process apart: many threads may do either, but not one while others do the other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Of threads that make NCCL communicators, or free them. Freeing one waits for the kernels of the whole process,
    and meanwhile holds up the launch that the first receive of a new one waits for.

    Nobody waits for ever: whoever has no more patience goes ahead.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = {"make": 0, "free": 0}

    @contextmanager
    def making(self, patience_s: float) -> Iterator[None]:
        with self._turn("make", "free", patience_s):
            yield

    @contextmanager
    def freeing(self, patience_s: float) -> Iterator[None]:
        with self._turn("free", "make", patience_s):
            yield

    @contextmanager
    def _turn(self, what: str, other: str, patience_s: float) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._running[other], patience_s)
            self._running[what] += 1
        try:
            yield
        finally:
            with self._changed:
                self._running[what] -= 1
                self._changed.notify_all()
