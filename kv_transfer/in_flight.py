"""Bounds the bytes that a sender has packed and not yet handed over: of each link, and of all of them together."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

_MOST_PASSED = 16  # smaller pieces that go before one that all links together leave no room for
Wait = Callable[[asyncio.Future[None]], Awaitable[None]]


@dataclass(slots=True, eq=False)
class _Piece:
    link: str
    num_bytes: int
    granted: asyncio.Future[None]
    num_passed: int = 0  # pieces that went before it although it came first


class InFlight:
    """Lives on the event loop. Within a link first come, first served; a full link does not hold up the others.

    One piece is always let through where nothing else is in flight, however large it is; smaller ones do not keep it
    waiting for ever.
    """

    def __init__(self, *, link_bytes: int, total_bytes: int) -> None:
        self._link_bytes = link_bytes
        self._total_bytes = total_bytes
        self._by_link: Counter[str] = Counter()
        self._total = 0
        self._waiting: deque[_Piece] = deque()

    @property
    def num_bytes(self) -> int:
        return self._total

    def has_room(self, link: str, num_bytes: int) -> bool:
        """Whether `take` would not wait."""
        if any(piece.link == link or piece.num_passed >= _MOST_PASSED for piece in self._waiting):
            return False
        return self._fits(link, num_bytes)

    async def take(self, link: str, num_bytes: int, wait: Wait | None = None) -> None:
        """Wait for room. Whoever waits here must hold nothing that others wait for.

        Args: wait: how, if there is none yet: it returns once the future is done.
        """
        if self.has_room(link, num_bytes):
            self._add(link, num_bytes, self._waiting)
            return
        granted = asyncio.get_running_loop().create_future()
        piece = _Piece(link, num_bytes, granted)
        self._waiting.append(piece)
        try:
            await (granted if wait is None else wait(granted))
        except BaseException:
            if granted.done() and not granted.cancelled():  # granted and cancelled at once
                self.give(link, num_bytes)
            elif piece in self._waiting:
                self._waiting.remove(piece)
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
        earlier: list[_Piece] = []
        for piece in list(self._waiting):
            if piece.granted.cancelled():  # its task has not run since
                self._waiting.remove(piece)
            elif piece.link not in full and self._fits(piece.link, piece.num_bytes):
                self._waiting.remove(piece)
                self._add(piece.link, piece.num_bytes, earlier)
                piece.granted.set_result(None)
            elif piece.num_passed >= _MOST_PASSED:
                return
            else:
                full.add(piece.link)
                earlier.append(piece)

    def _fits(self, link: str, num_bytes: int) -> bool:
        return self._fits_link(link, num_bytes) and (not self._total or self._total + num_bytes <= self._total_bytes)

    def _fits_link(self, link: str, num_bytes: int) -> bool:
        on_link = self._by_link.get(link, 0)
        return not on_link or on_link + num_bytes <= self._link_bytes

    def _add(self, link: str, num_bytes: int, earlier: Iterable[_Piece]) -> None:
        for piece in earlier:
            if self._fits_link(piece.link, piece.num_bytes):
                piece.num_passed += 1
        self._by_link[link] += num_bytes
        self._total += num_bytes
