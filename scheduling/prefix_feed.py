"""Changes of one worker's prefix index on their way to one router: collected, numbered, and told again after a gap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_BLOCKS = 4_096  # of one message: 32 KiB of hashes, which a router takes in within about 4 ms


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixChanges:
    """One message. Numbers follow each other; one that was missed cannot be made up for but by a restart."""

    number: int
    restarts: bool  # what was told before no longer counts
    added: Sequence[int]  # keys of blocks
    removed: Sequence[int]

    def follows(self, number: int | None) -> bool:
        """Whether somebody who has seen all up to `number` (None: nothing) may take this one in."""
        return self.restarts or self.number - 1 == number


def block_key(prefix_hash: bytes) -> int:
    """64 bits of a hash. Enough for an index that only hints: the worker compares whole hashes."""
    return int.from_bytes(prefix_hash[:8], "little")


class PrefixFeed:
    """Only the outcome is told: a block that comes and goes between two messages costs nothing.

    Not thread-safe: the engine's lock guards it.
    """

    def __init__(self) -> None:
        self._pending: dict[bytes, bool] = {}  # hash -> whether it is there now
        self._number = 0
        self._restarts = True

    @property
    def has_news(self) -> bool:
        return self._restarts or bool(self._pending)

    def added(self, prefix_hash: bytes) -> None:
        self._pending[prefix_hash] = True

    def removed(self, prefix_hash: bytes) -> None:
        self._pending[prefix_hash] = False

    def restart(self, held: Iterable[bytes]) -> None:
        self._pending = dict.fromkeys(held, True)
        self._restarts = True

    def take(self, limit: int = MAX_BLOCKS) -> PrefixChanges | None:
        """The next message, with at most `limit` blocks; None: there is nothing to tell."""
        if not self.has_news:
            return None
        pending = self._pending
        if len(pending) <= limit:
            told, self._pending = pending, {}
        else:
            told = {key: pending.pop(key) for key in list(pending)[:limit]}
        self._number += 1
        restarts, self._restarts = self._restarts, False
        return PrefixChanges(
            number=self._number,
            restarts=restarts,
            added=tuple(block_key(key) for key, there in told.items() if there),
            removed=tuple(block_key(key) for key, there in told.items() if not there),
        )
