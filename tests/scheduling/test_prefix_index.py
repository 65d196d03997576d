"""The router's index against sets, and the feed that keeps it equal to a worker's prefix cache."""

from __future__ import annotations

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from splitserve.scheduling.blocks import BlockAllocator
from splitserve.scheduling.prefix_feed import PrefixChanges, PrefixFeed, block_key
from splitserve.scheduling.prefix_index import PrefixIndex

WORKERS = ["a", "b", "c"]
workers, chains, depths = st.sampled_from(WORKERS), st.integers(0, 2), st.integers(0, 12)


def chain_keys(chain: int, start: int, end: int) -> list[int]:
    """Blocks [start, end) of a prompt."""
    return [100 * chain + place for place in range(start, end)]


class IndexMachine(RuleBasedStateMachine):
    """Prefixes grow, shrink from their end and are dropped with their worker; the index knows each one's length."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.model: dict[tuple[str, int], int] = {}  # (worker, prompt) -> blocks held

    @rule(worker=workers, chain=chains, depth=depths)
    def grow(self, worker: str, chain: int, depth: int) -> None:
        self.index.add(worker, chain_keys(chain, 0, depth))
        self.model[worker, chain] = max(depth, self.model.get((worker, chain), 0))

    @rule(worker=workers, chain=chains, depth=depths)
    def shrink(self, worker: str, chain: int, depth: int) -> None:
        self.index.remove(worker, chain_keys(chain, depth, 12))
        self.model[worker, chain] = min(depth, self.model.get((worker, chain), 0))

    @rule(worker=workers)
    def drop(self, worker: str) -> None:
        self.index.drop(worker)
        self.model = {key: depth for key, depth in self.model.items() if key[0] != worker}

    @rule(worker=workers, chain=chains, depth=depths)
    def restart(self, worker: str, chain: int, depth: int) -> None:
        self.drop(worker)
        held = chain_keys(chain, 0, depth)
        assert self.index.apply(worker, PrefixChanges(number=1, restarts=True, added=held, removed=()))
        self.model[worker, chain] = depth

    @rule(chain=chains, length=depths)
    def match(self, chain: int, length: int) -> None:
        held = {worker: min(length, self.model.get((worker, chain), 0)) for worker in WORKERS}
        expected = {worker: depth for worker, depth in held.items() if depth}
        assert self.index.match(chain_keys(chain, 0, length)) == expected


TestIndex = IndexMachine.TestCase
TestIndex.settings = hypothesis_settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_blocks_of_workers_that_went_are_swept_out_and_their_bits_used_again() -> None:
    index = PrefixIndex()
    for generation in range(100):  # more than a machine word has bits
        worker = f"w{generation}"
        held = PrefixChanges(number=1, restarts=True, added=range(50), removed=())
        assert index.apply(worker, held)
        assert index.match(range(50)) == {worker: 50}
        index.drop(worker)
        assert index.match(range(50)) == {}
    last = PrefixChanges(number=1, restarts=True, added=(99,), removed=())
    assert index.apply("last", last)
    assert len(index) == 1
    assert max(index._masks.values()) < 2**8


def test_a_missing_message_is_noticed_and_a_restart_makes_up_for_it() -> None:
    index, feed = PrefixIndex(), PrefixFeed()
    told = []
    for name in (b"1", b"2", b"3"):
        feed.added(name)
        changes = feed.take()
        assert changes is not None
        told.append(changes)
    first, _, third = told
    assert not index.apply("w", told[1]), "the first one is missing"
    assert index.apply("w", first)
    assert not index.apply("w", third)
    assert not index.apply("w", third)
    feed.restart([b"3"])
    again = feed.take()
    assert again is not None
    assert index.apply("w", again)
    assert index.match([block_key(b"3")]) == {"w": 1}
    assert index.match([block_key(b"1")]) == {}


def test_much_news_comes_in_several_messages_and_none_is_lost() -> None:
    index, feed = PrefixIndex(), PrefixFeed()
    names = [b"%08d" % number for number in range(10)]
    feed.restart(names)
    num_messages = 0
    while (changes := feed.take(limit=4)) is not None:
        assert index.apply("w", changes)
        num_messages += 1
    assert num_messages == 3
    assert index.match([block_key(name) for name in names]) == {"w": 10}


def test_what_comes_and_goes_between_two_messages_is_told_once() -> None:
    feed = PrefixFeed()
    assert feed.take() == PrefixChanges(number=1, restarts=True, added=(), removed=())
    feed.added(b"k")
    feed.removed(b"k")
    feed.added(b"k")
    assert feed.take() == PrefixChanges(number=2, restarts=False, added=(block_key(b"k"),), removed=())
    assert feed.take() is None


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(1, 4)), max_size=60), st.integers(1, 7))
def test_an_index_that_follows_an_allocator_holds_what_it_holds(
    steps: list[tuple[bool, int, int]], tell_every: int
) -> None:
    blocks, index = BlockAllocator(6, 16), PrefixIndex()
    feed = blocks.follow()
    live: list[list[int]] = []
    for number, (take, name, count) in enumerate(steps):
        if take and blocks.can_allocate(count):
            taken = blocks.allocate(count)
            for place, block in enumerate(taken):
                blocks.publish(block, b"%d.%d" % (name, place))
            live.append(taken)
        elif live:
            blocks.release(live.pop(name % len(live)))
        if number % tell_every == 0 and (changes := feed.take()) is not None:
            assert index.apply("w", changes)
    while (changes := feed.take()) is not None:
        assert index.apply("w", changes)
    for name in range(10):
        for place in range(4):
            key = b"%d.%d" % (name, place)
            held = bool(blocks.match([key], 16))
            assert (index.match([block_key(key)]) == {"w": 1}) is held
    blocks.unfollow(feed)
    blocks.drop_cache()
    assert not feed.has_news
