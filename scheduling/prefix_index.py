"""Which worker holds which prefix blocks: the router's view of all prefix caches, one bit a worker for each block.

A hint, never a promise: the worker looks again when the request gets there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .prefix_feed import PrefixChanges

_MAX_SHARED = 65_536  # masks; past it they are shared from the start again
_SWEPT_AT_ONCE = 2_048  # blocks looked at per message while a worker that has gone is swept out


class PrefixIndex:
    """Keys of blocks (`prefix_feed.block_key`) to bit masks of workers, in one dict of ints: about 75 bytes a block.

    A key covers the whole prefix up to its block's end, so a worker's match is the number of leading keys it holds.
    Not thread-safe.
    """

    def __init__(self) -> None:
        self._masks: dict[int, int] = {}
        self._same: dict[int, int] = {}  # each mask once, as one object: blocks share it, which saves a cache miss each
        self._bits: dict[str, int] = {}  # worker -> its bit
        self._workers: dict[int, str] = {}  # and back
        self._numbers: dict[str, int] = {}  # of the last message of each worker
        self.version = 0  # changes with what `match` would say
        self._alive = 0  # bits in use
        self._gone = 0  # bits of workers that were dropped, while some block may still have them
        self._unswept: list[int] = []  # blocks that may still have them

    def __len__(self) -> int:
        """Blocks that anybody holds, those of workers just dropped included."""
        return len(self._masks)

    def apply(self, worker: str, changes: PrefixChanges) -> bool:
        """Take in a worker's message. False: one before it is missing; ask for a restart."""
        if not changes.follows(self._numbers.get(worker)):
            return False
        if changes.restarts:
            self.drop(worker)
        self._numbers[worker] = changes.number
        self.add(worker, changes.added)
        self.remove(worker, changes.removed)
        self._sweep(_SWEPT_AT_ONCE)
        return True

    def add(self, worker: str, keys: Iterable[int]) -> None:
        bit = self._bits.get(worker) or self._new_bit(worker)
        self.version += 1
        masks, same = self._masks, self._same
        get, shared = masks.get, same.setdefault
        for key in keys:
            mask = get(key, 0) | bit
            masks[key] = shared(mask, mask)
        if len(same) > _MAX_SHARED:
            same.clear()

    def remove(self, worker: str, keys: Iterable[int]) -> None:
        bit = self._bits.get(worker, 0)
        self.version += 1
        masks = self._masks
        for key in keys:
            mask = masks.get(key, 0)
            if left := mask & ~bit:
                masks[key] = self._same.setdefault(left, left)
            elif mask:
                del masks[key]

    def drop(self, worker: str) -> None:
        """Forget all that a worker holds. At once for `match`; its memory is freed bit by bit."""
        self._numbers.pop(worker, None)
        bit = self._bits.pop(worker, 0)
        if not bit:
            return
        self.version += 1
        del self._workers[bit]
        self._alive &= ~bit
        self._gone |= bit
        self._unswept = list(self._masks)  # from the start again: those swept before may have this bit

    def holds(self, key: int) -> bool:
        """Whether any worker holds the block."""
        return self._at(key) != 0

    def match(self, keys: Sequence[int]) -> dict[str, int]:
        """How many leading keys each worker holds; those that hold none are left out.

        Searches by halves, since a lookup is a cache miss and prompts have thousands of blocks: a worker that holds a
        block almost always holds those before it, for caches evict a prefix from its end. Where one does not, it is
        taken to hold more than it does.
        """
        found: dict[str, int] = {}
        first = self._at(keys[0]) if keys else 0
        if not first:
            return found
        last = first & self._at(keys[-1])
        self._note(found, last, len(keys))
        parts = [(0, first, len(keys) - 1, last)]  # (place, who holds it, a later place, who of them holds that)
        while parts:
            low, holders, high, left = parts.pop()
            gone = holders & ~left
            if not gone:
                continue
            if high - low == 1:
                self._note(found, gone, high)
                continue
            middle = (low + high) // 2
            half = holders & self._at(keys[middle]) | left
            parts += (low, holders, middle, half), (middle, half, high, left)
        return found

    def _at(self, key: int) -> int:
        return self._masks.get(key, 0) & self._alive

    def _note(self, found: dict[str, int], bits: int, depth: int) -> None:
        while bits:
            bit = bits & -bits
            found[self._workers[bit]] = depth
            bits ^= bit

    def _new_bit(self, worker: str) -> int:
        free = ~(self._alive | self._gone)
        bit = free & -free
        self._bits[worker] = bit
        self._workers[bit] = worker
        self._alive |= bit
        return bit

    def _sweep(self, limit: int) -> None:
        """Clear the bits of workers that have gone from a few more blocks; after the last one the bits are free."""
        masks, gone = self._masks, self._gone
        for _ in range(min(limit, len(self._unswept))):
            key = self._unswept.pop()
            mask = masks.get(key, 0)
            if mask & gone:
                if left := mask & ~gone:
                    masks[key] = left
                else:
                    del masks[key]
        if not self._unswept:
            self._gone = 0
