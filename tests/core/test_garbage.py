"""Garbage is looked for when asked to: what is new each time, all of it once nobody asks, a few objects never."""

from __future__ import annotations

import asyncio
import gc
import weakref

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


async def test_what_outlived_a_collection_is_freed_once_nobody_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitserve.core.garbage._WHOLE_EVERY_S", 0.001)
    monkeypatch.setattr("splitserve.core.garbage._IDLE_S", 0.001)
    clock = Clock()
    garbage = Garbage(clock)
    made = nodes()
    gone = weakref.ref(made[0])
    garbage.collect()
    del made
    await asyncio.sleep(0.05)  # by the clock, it was called just now
    assert gone() is not None
    clock.now += 1.0
    async with asyncio.timeout(10):
        while gone() is not None:
            await asyncio.sleep(0.002)


async def test_who_is_called_all_the_time_looks_at_everything_once_in_a_long_while() -> None:
    clock = Clock()
    garbage = Garbage(clock)
    made = nodes()
    gone = weakref.ref(made[0])
    garbage.collect()
    del made
    left = []
    while gone() is not None:
        assert clock.now < 1000
        left.append(nodes())
        clock.now += 1.0
        garbage.collect()
    assert clock.now > 400  # each time, everybody's next token is late


async def test_a_few_objects_are_not_worth_it() -> None:
    garbage = Garbage()
    gc.collect()
    gone = weakref.ref(Node())
    garbage.collect()
    assert gone() is not None
