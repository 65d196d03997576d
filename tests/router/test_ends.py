"""Cancel and deadline at every edge of a request: whoever holds something for it is told at once, and nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from splitserve.core.errors import Cancelled, DeadlineExceeded
from splitserve.proto import worker_pb2

from .conftest import ANSWER, WAIT_S, Scene, ScriptedWorker, StartScene, granted
from .test_idempotency import Call

Edge = Callable[[Scene], Awaitable[list[ScriptedWorker]]]


async def queued(scene: Scene) -> list[ScriptedWorker]:
    """The only decode worker is full."""
    scene.decode.fail((await scene.decode.receive("grant")).request, "overloaded")
    async with asyncio.timeout(WAIT_S):
        while not scene.router.dispatcher.waiting.num_queued:
            await asyncio.sleep(0.002)
    return []


async def backing_off(scene: Scene) -> list[ScriptedWorker]:
    for _ in range(2):  # the first retry goes at once
        scene.decode.fail((await scene.decode.receive("grant")).request, "engine_failed")
    async with asyncio.timeout(WAIT_S):
        while scene.router.metrics.retries._value.get() < 2:
            await asyncio.sleep(0.001)
    return []


async def granting(scene: Scene) -> list[ScriptedWorker]:
    await scene.decode.receive("grant")
    return [scene.decode]


async def prefilling(scene: Scene) -> list[ScriptedWorker]:
    await granted(scene)
    return [scene.decode, scene.prefill]


async def transferring(scene: Scene) -> list[ScriptedWorker]:
    await with_first_token(scene)
    return [scene.decode, scene.prefill]


async def decoding(scene: Scene) -> list[ScriptedWorker]:
    work = await with_first_token(scene)
    scene.decode.transfer_done(work, ANSWER[0])
    scene.decode.tokens(work, 1, ANSWER[1:3])
    await num_tokens(scene, 3)
    return [scene.decode]  # the prefill worker is done


async def with_first_token(scene: Scene) -> worker_pb2.WorkRequest:
    prefill, work = await granted(scene)
    prefill.first_token(work, ANSWER[0])
    await num_tokens(scene, 1)
    return work


async def num_tokens(scene: Scene, count: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while scene.router.metrics.tokens._value.get() < count:
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("how", ["cancel", "leave", "deadline"])
@pytest.mark.parametrize("edge", [queued, backing_off, granting, prefilling, transferring, decoding])
async def test_a_request_that_ends_early_is_freed_where_it_is_held(
    start_scene: StartScene, edge: Edge, how: str
) -> None:
    scene = await start_scene(max_attempts=10)
    call = Call(scene)
    holders = await edge(scene)
    if how == "leave":
        call.call.cancel()
    elif how == "cancel":
        assert await scene.client.cancel("k")
    else:  # as its timer does; a real one might go off before the edge is reached
        scene.router.dispatcher._expire(scene.router.dispatcher._jobs["k"])
    for worker in holders:
        assert (await worker.receive_cancel()).request_id == "k"
    async with asyncio.timeout(WAIT_S):
        while scene.router.dispatcher.num_live:
            await asyncio.sleep(0.002)
    for worker in (scene.decode, scene.prefill):
        assert worker.cancels.empty() or worker not in holders
    scene.check_nothing_left()
    status = await scene.client.status()
    assert (status.num_cancelled, status.num_failed) == ((0, 1) if how == "deadline" else (1, 0))
    if how == "leave":
        with pytest.raises(asyncio.CancelledError):
            await call.end()
    else:
        with pytest.raises(Cancelled if how == "cancel" else DeadlineExceeded):
            await call.end()
