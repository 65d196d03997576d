"""What can wait does so until a step's tokens are out, and never for long."""

from __future__ import annotations

import asyncio

import pytest
from splitserve.worker.quiet import Quiet

pytestmark = pytest.mark.asyncio


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def turns(count: int = 4) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def stepping(clock: Clock, took_s: float) -> Quiet:
    """A step has just ended, and its messages are written."""
    quiet = Quiet(clock)
    quiet.stepped(clock.now, took_s)
    await turns()
    return quiet


async def test_nothing_waits_while_no_step_runs() -> None:
    clock = Clock()
    await asyncio.wait_for(Quiet(clock).wait(), 5.0)
    quiet = await stepping(clock, took_s=0.006)
    clock.now += 0.1  # the step ended long ago, and none followed
    await asyncio.wait_for(quiet.wait(), 5.0)


async def test_the_end_of_a_step_is_left_alone() -> None:
    clock = Clock()
    quiet = await stepping(clock, took_s=0.006)
    clock.now += 0.003
    await asyncio.wait_for(quiet.wait(), 5.0)
    clock.now += 0.002  # 1 ms before its end
    waiting = asyncio.ensure_future(quiet.wait())
    await turns()
    assert not waiting.done()
    clock.now += 0.0015
    quiet.stepped(clock.now, took_s=0.006)
    assert not waiting.done(), "the step's messages are not written yet"
    await asyncio.wait_for(waiting, 5.0)


async def test_between_short_steps_there_is_a_moment_for_it_each_time() -> None:
    clock = Clock()
    quiet = await stepping(clock, took_s=0.001)
    clock.now += 0.0008
    waiting = asyncio.ensure_future(quiet.wait())
    await turns()
    assert not waiting.done()
    quiet.stepped(clock.now, took_s=0.001)
    await asyncio.wait_for(waiting, 5.0)


@pytest.mark.parametrize("took_s", [0.006, 10.0])
async def test_it_waits_no_longer_than_a_few_milliseconds(took_s: float) -> None:
    clock = Clock()
    quiet = await stepping(clock, took_s)
    clock.now += took_s - 0.001
    waiting = asyncio.ensure_future(quiet.wait())
    await turns()
    assert not waiting.done()
    clock.now += 0.011
    await asyncio.wait_for(waiting, 5.0)
