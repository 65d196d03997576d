"""No more bytes wait than may, nobody waits for ever, and a cancelled waiter leaves nothing behind."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve.kv_transfer.in_flight import InFlight

LINK, TOTAL = 10, 25


@given(
    pieces=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 14), st.booleans()), min_size=1, max_size=60),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_bounds_hold_and_everyone_is_served(pieces: list[tuple[str, int, bool]], seed: int) -> None:
    async def run() -> None:
        in_flight = InFlight(link_bytes=LINK, total_bytes=TOTAL)
        held: list[tuple[str, int]] = []
        served: list[int] = []

        async def move(number: int, link: str, size: int) -> None:
            await in_flight.take(link, size)
            held.append((link, size))
            assert in_flight.num_bytes >= sum(other for _, other in held)  # some are let in and have not run yet
            assert sum(size for _, size in held) <= TOTAL or len(held) == 1
            on_link = [other for name, other in held if name == link]
            assert sum(on_link) <= LINK or len(on_link) == 1
            for _ in range(random.Random(seed + number).randint(0, 5)):
                await asyncio.sleep(0)
            held.remove((link, size))
            in_flight.give(link, size)
            served.append(number)

        tasks = [asyncio.create_task(move(n, link, size)) for n, (link, size, _) in enumerate(pieces)]
        await asyncio.sleep(0)
        cancelled = [n for n, (_, _, cancel) in enumerate(pieces) if cancel and not tasks[n].done()]
        waiting = [n for n in cancelled if pieces[n][:2] not in held]
        for number in waiting:
            tasks[number].cancel()
        async with asyncio.timeout(10):
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            assert task.cancelled() or task.exception() is None
        assert in_flight.num_bytes == 0
        assert {n for n, task in enumerate(tasks) if not task.cancelled()} == set(served)

    asyncio.run(run())


async def test_a_full_link_does_not_hold_up_the_others() -> None:
    in_flight = InFlight(link_bytes=LINK, total_bytes=TOTAL)
    await in_flight.take("a", LINK)
    waiting = asyncio.create_task(in_flight.take("a", 1))
    await asyncio.sleep(0)
    assert not in_flight.has_room("a", 1)
    await in_flight.take("b", LINK)
    assert not waiting.done()
    in_flight.give("a", LINK)
    await waiting
    assert in_flight.num_bytes == LINK + 1


async def test_who_cannot_wait_any_longer_leaves_its_place() -> None:
    in_flight = InFlight(link_bytes=LINK, total_bytes=TOTAL)
    await in_flight.take("a", LINK)

    async def lose_patience(granted: asyncio.Future[None]) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        await in_flight.take("a", 1, lose_patience)
    in_flight.give("a", LINK)
    assert in_flight.num_bytes == 0
    assert in_flight.has_room("a", LINK)


async def test_small_pieces_of_many_links_do_not_keep_a_large_one_waiting_for_ever() -> None:
    in_flight = InFlight(link_bytes=LINK, total_bytes=24)
    for number in range(12):
        await in_flight.take(f"small-{number}", 2)
    large = asyncio.create_task(in_flight.take("large", 3))
    await asyncio.sleep(0)

    async def keep_sending(link: str) -> None:
        while not large.done():
            in_flight.give(link, 2)
            await in_flight.take(link, 2)
            await asyncio.sleep(0)

    sending = [asyncio.create_task(keep_sending(f"small-{number}")) for number in range(12)]
    async with asyncio.timeout(10):
        await large
        await asyncio.sleep(0)
        in_flight.give("large", 3)
        await asyncio.gather(*sending)
    assert in_flight.num_bytes == 24
