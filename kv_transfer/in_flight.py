"""Bounds the bytes that a sender has packed and not yet handed over: of each link, and of all of them together."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable

Wait = Callable[[asyncio.Future[None]], Awaitable[None]]


class InFlight:
    """Lives on the event loop. Within a link first come, first served; a full link does not hold up the others.

    One piece is always let through where nothing else is in flight, however large it is.
    """

    def __init__(self, *, link_bytes: int, total_bytes: int) -> None:
        self._link_bytes = link_bytes
        self._total_bytes = total_bytes
        self._by_link: Counter[str] = Counter()
        self._total = 0
        self._waiting: deque[tuple[str, int, asyncio.Future[None]]] = deque()

    @property
    def num_bytes(self) -> int:
        return self._total

    def has_room(self, link: str, num_bytes: int) -> bool:
        """Whether `take` would not wait."""
        return not any(waiting == link for waiting, _, _ in self._waiting) and self._fits(link, num_bytes)

    async def take(self, link: str, num_bytes: int, wait: Wait | None = None) -> None:
        """Wait for room. Whoever waits here must hold nothing that others wait for.

        Args: wait: how, if there is none yet: it returns once the future is done.
        """
        if self.has_room(link, num_bytes):
            self._add(link, num_bytes)
            return
        granted = asyncio.get_running_loop().create_future()
        entry = (link, num_bytes, granted)
        self._waiting.append(entry)
        try:
            await (granted if wait is None else wait(granted))
        except BaseException:
            if granted.done() and not granted.cancelled():  # granted and cancelled at once
                self.give(link, num_bytes)
            elif entry in self._waiting:
                self._waiting.remove(entry)
                self._grant()
            raise

    def give(self, link: str, num_bytes: int) -> None:
        """The bytes have left, or never will."""
        self._total -= num_bytes
        self._by_link[link] -= num_bytes
        if not self._by_link[link]:
            del self._by_link[link]
        self._grant()

    def _grant(self) -> None:
        full: set[str] = set()
        for entry in list(self._waiting):
            link, num_bytes, granted = entry
            if granted.cancelled():  # its task has not run since
                self._waiting.remove(entry)
                continue
            if link in full or not self._fits(link, num_bytes):
                full.add(link)
                continue
            self._waiting.remove(entry)
            self._add(link, num_bytes)
            granted.set_result(None)

    def _fits(self, link: str, num_bytes: int) -> bool:
        on_link = self._by_link.get(link, 0)
        return (not on_link or on_link + num_bytes <= self._link_bytes) and (
            not self._total or self._total + num_bytes <= self._total_bytes
        )

    def _add(self, link: str, num_bytes: int) -> None:
        self._by_link[link] += num_bytes
        self._total += num_bytes
