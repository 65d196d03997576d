"""State machines under random orders of events: no illegal transition, and nothing lost or owned twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from splitserve.core.errors import KvCorrupted, SplitserveError
from splitserve.core.request import FinishReason
from splitserve.kv_transfer.fetching import Received
from splitserve.kv_transfer.grants import Grant
from splitserve.scheduling.attempts import Answer, NewTokens
from splitserve.scheduling.blocks import BlockAllocator
from splitserve.scheduling.prefix import prefix_hashes, prefix_namespace

from ..kv_transfer.conftest import pair_factory

ANSWER = tuple(range(100, 108))
BLOCKS = 12
TOKENS = 20  # of each moved request: two blocks
WAIT_S = 30.0


class AnswerMachine(RuleBasedStateMachine):
    """Two workers report on attempts that come and go; some lie."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = Answer()
        self.given: list[int] = []  # what a client has read
        self.ends = 0

    @rule(back=st.integers(0, 2), start=st.integers(0, 8), count=st.integers(0, 4))
    def tell(self, back: int, start: int, count: int) -> None:
        """An honest worker's word, of the live attempt or an older one, in any order."""
        end = min(start + count, len(ANSWER))
        message = NewTokens(
            request_id="r",
            attempt=self.answer.attempt - back,
            index=start,
            token_ids=ANSWER[start:end],
            finish_reason=FinishReason.LENGTH if end == len(ANSWER) and start < end else None,
        )
        was_stale, stale = self.answer.num_stale, back or self.answer.ended or self.answer.finish_reason is not None
        grown = self.answer.accept(message)
        assert not (stale and grown)
        assert self.answer.num_stale == was_stale + bool(stale)
        self.given += self.answer.token_ids[len(self.given) :]

    @rule(start=st.integers(0, 7))
    def lie(self, start: int) -> None:
        """Another token where one is known costs the attempt; where none is, nobody can tell yet, so it is revoked."""
        message = NewTokens(request_id="r", attempt=self.answer.attempt, index=start, token_ids=(1,))
        is_known = start < len(self.answer.token_ids)
        if self.answer.ended or self.answer.finish_reason is not None or not is_known:
            return
        try:
            self.answer.accept(message)
        except KvCorrupted:
            self.answer.next_attempt()
        else:
            raise AssertionError("two tokens for one place went unnoticed")

    @rule()
    def revoke(self) -> None:
        if self.answer.finish_reason is None:
            self.answer.next_attempt()

    @rule()
    def end(self) -> None:
        self.ends += self.answer.end()

    @invariant()
    def is_a_prefix_that_only_grows(self) -> None:
        assert tuple(self.answer.token_ids) == ANSWER[: len(self.answer.token_ids)]
        assert self.given == self.answer.token_ids
        assert self.ends <= 1
        assert self.answer.finish_reason is None or len(self.given) == len(ANSWER)


class BlockMachine(RuleBasedStateMachine):
    """Sequences and grants take, share, publish and give up blocks; the cache fills and is dropped."""

    held = Bundle("held")  # (blocks, whether granted)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockAllocator(BLOCKS, 16)
        self.owners: Counter[int] = Counter()
        self.hashes = {
            seed: prefix_hashes([seed * 99 + i for i in range(4 * 16)], prefix_namespace(model_id="m", kv_dtype="f"))
            for seed in range(4)
        }

    @rule(target=held, seed=st.integers(0, 3), count=st.integers(1, 4), granted=st.booleans())
    def take(self, seed: int, count: int, granted: bool) -> object:
        """As a request does: what the cache holds of its prefix, and new blocks for the rest."""
        shared = self.blocks.match(self.hashes[seed], count * 16)
        if not self.blocks.can_allocate(count - len(shared), shared):
            return multiple()
        self.blocks.share(shared, granted=granted)
        new = self.blocks.allocate(count - len(shared), granted=granted)
        assert all(self.owners[block] == 0 for block in new), "a block that somebody owns was given away"
        taken = (*shared, *new)
        self.owners.update(taken)
        return (seed, taken, granted)

    @rule(entry=held, upto=st.integers(1, 4))
    def publish(self, entry: tuple[int, tuple[int, ...], bool], upto: int) -> None:
        seed, taken, _ = entry
        if all(self.owners[block] for block in taken):
            for block, value in zip(taken[:upto], self.hashes[seed], strict=False):
                self.blocks.publish(block, value)

    @rule(target=held, entry=consumes(held))
    def commit(self, entry: tuple[int, tuple[int, ...], bool]) -> object:
        seed, taken, granted = entry
        if granted:
            self.blocks.grant_to_live(taken)
        return (seed, taken, False)

    @rule(entry=consumes(held))
    def release(self, entry: tuple[int, tuple[int, ...], bool]) -> None:
        _, taken, granted = entry
        self.blocks.release(taken, granted=granted)
        self.owners.subtract(taken)

    @rule()
    def drop_cache(self) -> None:
        self.blocks.drop_cache()

    @invariant()
    def is_conserved(self) -> None:
        counts = self.blocks.counts()
        assert counts.free + counts.cached + counts.granted + counts.live == counts.total == BLOCKS
        assert min(counts.free, counts.cached, counts.granted, counts.live) >= 0
        owned = {block for block, owners in self.owners.items() if owners}
        assert self.blocks.owned() == owned
        assert counts.granted + counts.live == len(owned)


class TransferMachine(RuleBasedStateMachine):
    """Grants between a real sender and a real receiver: every order of request, fetch, KV, end, failure and commit."""

    grants = Bundle("grants")

    @initialize()
    def connect(self) -> None:
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        self.pair = self.runner.run(self.stack.enter_async_context(pair_factory()()))
        self.offered: list[str] = []
        self.receives: dict[str, asyncio.Task[Received]] = {}
        self.written: set[str] = set()
        self.finished: set[str] = set()
        self.failed: set[str] = set()
        self.tables: dict[str, list[int]] = {}

    def turn(self) -> None:
        """Let both sides do what is due."""
        self.runner.run(asyncio.sleep(0.005))

    @rule(target=grants)
    def grant(self) -> object:
        number = len(self.tables)
        if number >= self.pair.source.num_blocks // 2:
            return multiple()
        request = self.pair.request(TOKENS, f"r{number}")
        grant = self.pair.grant(request)
        self.tables[grant.request_id] = [2 * number, 2 * number + 1]  # on both sides
        return grant

    @rule(grant=grants)
    def offer(self, grant: Grant) -> None:
        tokens = self.pair.request(TOKENS, grant.request_id).prompt_token_ids
        self.runner.run(self._offer(grant, tokens))

    async def _offer(self, grant: Grant, tokens: tuple[int, ...]) -> None:
        if grant.request_id not in self.offered:
            self.pair.sender.offer(grant, tokens, lambda _: self.tables[grant.request_id])
            self.offered.append(grant.request_id)

    @rule(grant=grants)
    def fetch(self, grant: Grant) -> None:
        if grant.request_id in self.receives:
            return
        tokens = self.pair.request(TOKENS, grant.request_id).prompt_token_ids
        receive = self.pair.receiver.receive(grant, self.pair.address, tokens, self.tables[grant.request_id])
        self.receives[grant.request_id] = self.runner.get_loop().create_task(receive)
        self.turn()

    @rule(grant=grants)
    def write(self, grant: Grant) -> None:
        if grant.request_id in self.offered and grant.request_id not in self.written:
            self.pair.sender.kv_written(grant.request_id, 0, self.pair.source.geometry.num_layers, 0, TOKENS)
            self.written.add(grant.request_id)

    @rule(grant=grants)
    def finish(self, grant: Grant) -> None:
        if grant.request_id in self.written and grant.request_id not in self.failed:
            self.runner.run(self._finish(grant))

    async def _finish(self, grant: Grant) -> None:
        self.pair.sender.finish(grant.request_id, 7, final=False)
        self.finished.add(grant.request_id)

    @rule(grant=grants)
    def prefill(self, grant: Grant) -> None:
        """The request's whole life on the prefill worker, in order."""
        self.offer(grant)
        self.write(grant)
        self.finish(grant)
        self.turn()

    @rule(grant=grants)
    def fail(self, grant: Grant) -> None:
        self.runner.run(self._fail(grant.request_id))

    async def _fail(self, request_id: str) -> None:
        self.pair.sender.fail(request_id, SplitserveError("it failed"))
        if request_id in self.offered:
            self.failed.add(request_id)

    @rule(grant=grants)
    def leave(self, grant: Grant) -> None:
        """The decode worker's request is cancelled."""
        if (receiving := self.receives.get(grant.request_id)) is not None:
            receiving.cancel()
            self.turn()

    @rule(grant=grants)
    def commit(self, grant: Grant) -> None:
        receiving = self.receives.get(grant.request_id)
        if receiving is not None and receiving.done() and not receiving.cancelled() and not receiving.exception():
            self.runner.run(self.pair.receiver.commit(grant, self.pair.address, receiving.result()))

    @rule()
    def wait(self) -> None:
        self.turn()

    @invariant()
    def nothing_is_released_twice_or_unasked(self) -> None:
        if hasattr(self, "pair"):
            assert all(count == 1 for count in Counter(self.pair.released).values())
            assert set(self.pair.released) <= set(self.offered)

    @invariant()
    def only_whole_kv_is_received(self) -> None:
        for request_id, receiving in getattr(self, "receives", {}).items():
            if receiving.done() and not receiving.cancelled() and receiving.exception() is None:
                assert request_id in self.finished
                assert receiving.result().first_token_id == 7
                self.pair.source_table = self.pair.target_table = self.tables[request_id]
                self.pair.assert_arrived(self._span())

    def _span(self) -> Grant:
        return self.pair.grant(self.pair.request(TOKENS))

    def teardown(self) -> None:
        if not hasattr(self, "pair"):
            return
        for request_id in self.tables:
            self.runner.run(self._fail(request_id))
        for receiving in self.receives.values():
            receiving.cancel()
        if self.receives:
            self.runner.run(asyncio.wait(self.receives.values(), timeout=WAIT_S))
        assert all(receiving.done() for receiving in self.receives.values())
        assert sorted(self.pair.released) == sorted(self.offered)
        for receiving in self.receives.values():
            error = None if receiving.cancelled() else receiving.exception()
            assert error is None or isinstance(error, SplitserveError), error
        self.runner.run(self.stack.aclose())
        self.runner.close()


TestAnswers = AnswerMachine.TestCase
TestAnswers.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestBlocks = BlockMachine.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTransfers = TransferMachine.TestCase
TestTransfers.settings = settings(max_examples=12, stateful_step_count=30, deadline=None)
