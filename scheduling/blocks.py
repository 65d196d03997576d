"""Block allocation: every KV block is free, cached, granted or live, and never two of these at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..core.errors import ConfigError
from ..core.kv_geometry import PREFIX_UNIT
from .prefix_feed import PrefixFeed


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCounts:
    """Blocks by state; `free + cached + granted + live == total` at every moment."""

    total: int
    free: int  # hold nothing
    cached: int  # only the prefix index holds them; evicted when somebody needs a block
    granted: int  # reserved for an incoming transfer and by nobody else
    live: int  # held by at least one sequence


class BlockAllocator:
    """Reference-counted blocks with a prefix index; blocks without an owner stay cached, least recently used first out.

    Not thread-safe: the engine's lock guards it.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        if block_size < PREFIX_UNIT or block_size % PREFIX_UNIT:
            raise ConfigError(f"block_size is {block_size}; it must be a multiple of {PREFIX_UNIT} tokens")
        if num_blocks < 1:
            raise ConfigError(f"the KV pool has {num_blocks} blocks; give it memory for at least one")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.has_prefix_cache = prefix_cache
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: low ids first, recently used rows stay warm
        self._live = [0] * num_blocks  # owners of each block that are sequences
        self._granted = [0] * num_blocks  # owners that are reservations
        self._num_live = self._num_granted = 0  # kept: counting tens of thousands of blocks takes milliseconds
        self._by_hash: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._feeds: list[PrefixFeed] = []  # whom to tell of changes of the index
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached blocks without owner, next to evict first

    @property
    def num_available(self) -> int:
        """Blocks that can be had right now: free ones and cached ones that nobody owns."""
        return len(self._free) + len(self._idle)

    def counts(self) -> BlockCounts:
        return BlockCounts(
            total=self.num_blocks,
            free=len(self._free),
            cached=len(self._idle),
            granted=self._num_granted,
            live=self._num_live,
        )

    def can_allocate(self, num_blocks: int, sharing: Sequence[int] = ()) -> bool:
        """Whether `num_blocks` new blocks exist once the cached blocks in `sharing` are pinned."""
        return num_blocks + sum(1 for block in sharing if block in self._idle) <= self.num_available

    def allocate(self, num_blocks: int, *, granted: bool = False) -> list[int]:
        """Take blocks that hold nothing, evicting the least recently used cached ones; guard with `can_allocate`."""
        assert num_blocks <= self.num_available, "allocate without can_allocate"
        owners = self._granted if granted else self._live
        taken = self._free[: -num_blocks - 1 : -1]  # from the top of the stack; a prompt's hundreds at once
        del self._free[len(self._free) - len(taken) :]
        taken += [self._evict() for _ in range(num_blocks - len(taken))]
        for block in taken:
            owners[block] = 1  # the first, so there is no need for _own
        if granted:
            self._num_granted += num_blocks
        else:
            self._num_live += num_blocks
        return taken

    def match(self, hashes: Sequence[bytes], max_tokens: int) -> list[int]:
        """Blocks of the longest cached prefix of at most `max_tokens` tokens, whole blocks only; takes nothing."""
        per_block = self.block_size // PREFIX_UNIT
        found: list[int] = []
        if self.has_prefix_cache:
            for index in range(min(max_tokens // self.block_size, len(hashes) // per_block)):
                block = self._by_hash.get(hashes[(index + 1) * per_block - 1])
                if block is None:
                    break
                found.append(block)
        return found

    def share(self, blocks: Iterable[int], *, granted: bool = False) -> None:
        """Become one more owner of cached or owned blocks."""
        for block in blocks:
            self._idle.pop(block, None)
            self._own(block, 1, granted=granted)

    def grant_to_live(self, blocks: Iterable[int]) -> None:
        """The transfer is committed: what the reservation owned, a sequence owns now."""
        live, granted = self._live, self._granted
        num_moved = 0
        for block in blocks:
            assert granted[block] > 0, f"block {block} is not granted"
            if granted[block] == 1 and not live[block]:  # its only owner, as of all but a shared prefix
                granted[block], live[block] = 0, 1
                num_moved += 1
            else:
                self._own(block, 1, granted=False)
                self._own(block, -1, granted=True)
        self._num_live += num_moved
        self._num_granted -= num_moved

    def publish(self, block: int, prefix_hash: bytes) -> None:
        """Enter a full, owned block into the prefix index; the first block with a hash keeps it."""
        if self.has_prefix_cache and prefix_hash not in self._by_hash and block not in self._hash_of:
            self._by_hash[prefix_hash] = block
            self._hash_of[block] = prefix_hash
            for feed in self._feeds:
                feed.added(prefix_hash)

    def withdraw(self, blocks: Iterable[int]) -> None:
        """Take blocks out of the prefix index: their owners keep them, and nobody else finds them."""
        for block in blocks:
            if (prefix_hash := self._hash_of.pop(block, None)) is not None:
                del self._by_hash[prefix_hash]
                for feed in self._feeds:
                    feed.removed(prefix_hash)

    def release(self, blocks: Sequence[int], *, granted: bool = False) -> None:
        """Give up ownership; a published block stays cached. The last blocks of a prefix are evicted first."""
        owners = self._granted if granted else self._live
        num_left = 0  # by their last owner
        for block in reversed(blocks):
            assert owners[block] > 0, f"block {block} is released twice"
            if self._live[block] + self._granted[block] > 1:
                self._own(block, -1, granted=granted)
                continue
            owners[block] = 0
            num_left += 1
            if block in self._hash_of:
                self._idle[block] = None
            else:
                self._free.append(block)
        if granted:
            self._num_granted -= num_left
        else:
            self._num_live -= num_left

    def drop_cache(self) -> None:
        """Forget every cached block that nobody owns."""
        while self._idle:
            self._free.append(self._evict())

    def follow(self) -> PrefixFeed:
        """A feed of the prefix index: what it holds now, and from then on its changes. End it with `unfollow`."""
        feed = PrefixFeed()
        feed.restart(self._by_hash)
        self._feeds.append(feed)
        return feed

    def unfollow(self, feed: PrefixFeed) -> None:
        self._feeds.remove(feed)

    def restart(self, feed: PrefixFeed) -> None:
        """Its reader has lost track: tell it all again."""
        feed.restart(self._by_hash)

    def owned(self) -> set[int]:
        """Blocks with at least one owner."""
        return {b for b in range(self.num_blocks) if self._live[b] or self._granted[b]}

    def _own(self, block: int, change: int, *, granted: bool) -> None:
        """One owner more or less, and what that makes of the counts."""
        self._num_live -= self._live[block] > 0
        self._num_granted -= self._granted[block] > 0 and not self._live[block]
        (self._granted if granted else self._live)[block] += change
        self._num_live += self._live[block] > 0
        self._num_granted += self._granted[block] > 0 and not self._live[block]

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        self.withdraw((block,))
        return block
