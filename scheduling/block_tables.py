"""Block tables of sequences: what the prefix cache has for them, what they take, and what they let others find."""

from __future__ import annotations

from collections.abc import MutableSequence

from ..core.kv_geometry import PREFIX_UNIT, blocks_for
from .blocks import BlockAllocator
from .prefix import Contents
from .sequence import Sequence, SequenceState


class BlockTables:
    """Fills and empties block tables. A reserved sequence owns granted blocks, every other one live ones.

    Args: contents: what stands for the prefixes of a sequence's tokens.
    """

    def __init__(self, blocks: BlockAllocator, contents: Contents) -> None:
        self._blocks = blocks
        self._contents = contents

    def cached(self, sequence: Sequence, max_tokens: int) -> list[int]:
        """Blocks of the longest cached prefix of at most `max_tokens` of its tokens; takes nothing."""
        if self._blocks.has_prefix_cache:
            self._extend_hashes(sequence, sequence.token_ids)
        return self._blocks.match(sequence.prefix_hashes, max_tokens)

    def fill(self, sequence: Sequence, hits: list[int], num_tokens: int) -> None:
        """Give it the cached blocks `hits` and new ones up to `num_tokens` tokens; guard with `can_allocate`."""
        granted = sequence.state is SequenceState.RESERVED
        needed = blocks_for(num_tokens, self._blocks.block_size) - len(hits)
        self._blocks.share(hits, granted=granted)
        sequence.block_table = hits + self._blocks.allocate(needed, granted=granted)
        sequence.num_cached = len(hits) * self._blocks.block_size
        sequence.num_published = len(hits)

    def publish(self, sequence: Sequence, num_computed: int) -> None:
        """Enter the blocks that became full with the first `num_computed` tokens into the prefix index."""
        blocks = self._blocks
        full = num_computed // blocks.block_size
        if full <= sequence.num_published or not blocks.has_prefix_cache:
            return
        known = sequence.token_ids[:num_computed]  # those behind may be pending
        self._extend_hashes(sequence, known)
        units = blocks.block_size // PREFIX_UNIT
        for index in range(sequence.num_published, full):
            blocks.publish(sequence.block_table[index], sequence.prefix_hashes[(index + 1) * units - 1])
        sequence.num_published = full

    def clear(self, sequence: Sequence) -> None:
        """Give up all its blocks; those that it published stay cached."""
        self._blocks.release(sequence.block_table, granted=sequence.state is SequenceState.RESERVED)
        sequence.block_table = []

    def _extend_hashes(self, sequence: Sequence, token_ids: MutableSequence[int]) -> None:
        self._contents.extend_hashes(sequence.prefix_hashes, token_ids, sequence.request, sequence.kv_history)
