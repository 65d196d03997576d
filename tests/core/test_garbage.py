"""Garbage is looked for when asked to: what is new each time, all of it once nobody asks, a few objects never."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest
from splitserve.core.garbage import Garbage

pytestmark = pytest.mark.asyncio


class Node:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def by_hand():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def nodes() -> list[Node]:
    return [Node() for _ in range(200)]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_what_was_made_of_late_is_freed() -> None:
    made = nodes()
    gone = weakref.ref(made[0])
    del made
    assert gone() is not None
    Garbage().collect()
    assert gone() is None


@pytest.fixture
def taken_over(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a process does to its collector is undone."""
    monkeypatch.setattr("splitserve.core.garbage._LOOK_S", 0.002)
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


async def outlived(garbage: Garbage) -> weakref.ref[Node]:
    """Garbage that was not yet when it was young."""
    made = nodes()
    garbage.collect()
    return weakref.ref(made[0])


async def test_what_outlived_a_collection_is_freed_once_nobody_calls(taken_over: None) -> None:
    clock = Clock()
    garbage = Garbage(clock)
    garbage.take_over()
    gone = await outlived(garbage)
    clock.now += 1.5  # a long step
    await asyncio.sleep(0.05)
    assert gone() is not None
    clock.now += 1.0
    async with asyncio.timeout(10):
        while gone() is not None:
            await asyncio.sleep(0.002)


async def test_who_is_called_all_the_time_looks_at_everything_once_a_minute(taken_over: None) -> None:
    """Each time, everybody's next token is late."""
    clock = Clock()
    garbage = Garbage(clock)
    garbage.take_over()
    clock.now += 10_000  # of which nothing became old
    await asyncio.sleep(0.05)
    gone = await outlived(garbage)
    for _ in range(5):
        clock.now += 10
        garbage.collect()
        await asyncio.sleep(0.01)
        assert gone() is not None
    async with asyncio.timeout(10):
        while gone() is not None:
            clock.now += 1
            garbage.collect()
            await asyncio.sleep(0.002)
    assert clock.now < 10_200


async def test_the_collector_leaves_old_objects_to_us(taken_over: None) -> None:
    garbage = Garbage(Clock())
    garbage.take_over()
    gone = await outlived(garbage)
    gc.enable()
    left = [nodes() for _ in range(500)]  # twenty times what it would need
    gc.disable()
    assert gone() is not None
    assert left


async def test_a_few_objects_are_not_worth_it() -> None:
    garbage = Garbage()
    gc.collect()
    gone = weakref.ref(Node())
    garbage.collect()
    assert gone() is not None
