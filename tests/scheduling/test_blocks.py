"""Block allocation: nothing lost, nothing owned twice, least recently used evicted first."""

import pytest
from splitserve.core.errors import ConfigError
from splitserve.scheduling.blocks import BlockAllocator
from splitserve.scheduling.prefix import prefix_hashes, prefix_namespace

ROOT = prefix_namespace(model_id="m", kv_dtype="float32")


def hashes_of(seed: int, num_blocks: int) -> list[bytes]:
    return prefix_hashes([seed * 1000 + i for i in range(num_blocks * 16)], ROOT)


def cache(blocks: BlockAllocator, hashes: list[bytes]) -> list[int]:
    """Compute and release a prompt, so that only the index holds it."""
    taken = blocks.allocate(len(hashes))
    for block, value in zip(taken, hashes, strict=True):
        blocks.publish(block, value)
    blocks.release(taken)
    return taken


def test_released_blocks_are_found_by_their_prefix() -> None:
    blocks = BlockAllocator(8, 16)
    taken = cache(blocks, hashes_of(1, 3))
    assert blocks.match(hashes_of(1, 3), 48) == taken
    assert blocks.match(hashes_of(1, 3), 47) == taken[:2]
    assert blocks.match(hashes_of(2, 3), 48) == []
    assert blocks.counts().cached == 3


def test_the_least_recently_used_prefix_is_evicted_first_and_from_its_end() -> None:
    blocks = BlockAllocator(6, 16)
    old, new = cache(blocks, hashes_of(1, 3)), cache(blocks, hashes_of(2, 3))
    blocks.allocate(1)
    assert blocks.match(hashes_of(1, 3), 48) == old[:2]
    assert blocks.match(hashes_of(2, 3), 48) == new


def test_use_renews_a_cached_prefix() -> None:
    blocks = BlockAllocator(6, 16)
    old = cache(blocks, hashes_of(1, 3))
    cache(blocks, hashes_of(2, 3))
    blocks.share(old)
    blocks.release(old)
    blocks.allocate(3)
    assert blocks.match(hashes_of(1, 3), 48) == old
    assert blocks.match(hashes_of(2, 3), 48) == []


def test_shared_blocks_survive_until_their_last_owner() -> None:
    blocks = BlockAllocator(4, 16)
    taken = blocks.allocate(2)
    blocks.share(taken, granted=True)
    blocks.release(taken)
    assert (blocks.counts().granted, blocks.counts().free) == (2, 2)
    blocks.release(taken, granted=True)
    assert blocks.counts().free == 4


def test_pinning_cached_blocks_counts_against_what_is_available() -> None:
    blocks = BlockAllocator(4, 16)
    cached = cache(blocks, hashes_of(1, 2))
    assert blocks.can_allocate(4)
    assert not blocks.can_allocate(3, cached)
    assert blocks.can_allocate(2, cached)


def test_a_block_larger_than_the_prefix_unit_is_found_only_whole() -> None:
    blocks = BlockAllocator(4, 32)
    hashes = hashes_of(1, 4)  # 64 tokens, two blocks
    taken = blocks.allocate(2)
    blocks.publish(taken[0], hashes[1])
    blocks.publish(taken[1], hashes[3])
    assert blocks.match(hashes, 64) == taken
    assert blocks.match(hashes[:3], 64) == taken[:1]


def test_without_a_prefix_cache_nothing_is_kept() -> None:
    blocks = BlockAllocator(4, 16, prefix_cache=False)
    cache(blocks, hashes_of(1, 3))
    assert (blocks.counts().cached, blocks.counts().free) == (0, 4)


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 8), (4, 24)])
def test_impossible_sizes_are_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ConfigError):
        BlockAllocator(num_blocks, block_size)


def test_counts_follow_each_owner_that_comes_and_goes() -> None:
    blocks = BlockAllocator(4, 16)
    taken = blocks.allocate(1, granted=True)
    assert (blocks.counts().granted, blocks.counts().live) == (1, 0)
    blocks.share(taken)  # a sequence owns it as well: live wins
    assert (blocks.counts().granted, blocks.counts().live) == (0, 1)
    blocks.release(taken)
    assert (blocks.counts().granted, blocks.counts().live) == (1, 0)
    blocks.grant_to_live(taken)
    assert (blocks.counts().granted, blocks.counts().live) == (0, 1)
    blocks.release(taken)
    assert (blocks.counts().granted, blocks.counts().live, blocks.counts().free) == (0, 0, 4)
