"""Stand-ins for tokens: lengths are right, and prefixes match exactly as far as hash ids say."""

from hypothesis import given
from hypothesis import strategies as st
from splitserve.planner.trace_contents import CountedTokens, TraceContents
from splitserve.planner.types import SimRequest
from splitserve.scheduling.blocks import BlockAllocator

HASH_TOKENS = 64


def test_counted_tokens_are_a_list_of_that_length() -> None:
    tokens = CountedTokens(5)
    tokens.append(7)
    tokens.extend([1, 2, 3])
    assert len(tokens) == 9
    assert len(tokens[2:6]) == 4
    assert len(tokens[:100]) == 9
    del tokens[0]
    tokens.pop()
    assert len(tokens) == 7
    assert set(tokens) == {0}


def matched_tokens(first: SimRequest, second: SimRequest, block_size: int) -> int:
    """Tokens of `second` that a cache holds after `first`."""
    contents = TraceContents(block_size)
    blocks = BlockAllocator(2000, block_size)
    works = [contents.enter(str(number), request) for number, request in enumerate((first, second))]
    hashes: list[list[bytes]] = [[], []]
    for work, found in zip(works, hashes, strict=True):
        contents.extend_hashes(found, contents.token_ids(work), work)
    units = block_size // 16
    for index, block in enumerate(blocks.allocate(first.isl // block_size)):
        blocks.publish(block, hashes[0][(index + 1) * units - 1])
    return len(blocks.match(hashes[1], second.isl)) * block_size


def request(isl: int, ids: tuple[int, ...]) -> SimRequest:
    return SimRequest(arrival_s=0.0, isl=isl, osl=1, hash_ids=ids, hash_block_tokens=HASH_TOKENS)


ids = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple)


@given(ids, ids, st.sampled_from([16, 32, 64, 128, 192]))
def test_blocks_match_as_long_as_all_hash_ids_before_do(
    first: tuple[int, ...], second: tuple[int, ...], block_size: int
) -> None:
    common = 0
    while common < min(len(first), len(second)) and first[common] == second[common]:
        common += 1
    matched = matched_tokens(
        request(len(first) * HASH_TOKENS, first), request(len(second) * HASH_TOKENS, second), block_size
    )
    assert matched == common * HASH_TOKENS // block_size * block_size


def test_equal_ids_behind_different_ones_do_not_match() -> None:
    assert matched_tokens(request(192, (1, 5, 6)), request(192, (2, 5, 6)), 16) == 0


def test_prompts_without_ids_match_only_themselves() -> None:
    plain = SimRequest(arrival_s=0.0, isl=256, osl=1)
    assert matched_tokens(plain, plain, 16) == 0


def test_ids_that_cover_a_part_match_in_that_part() -> None:
    assert matched_tokens(request(300, (1, 2)), request(300, (1, 2)), 32) == 128
