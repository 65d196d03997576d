"""Requests that wait: too late ones are told, the others are served in their order."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from splitserve.core.errors import Overloaded

from .conftest import ANSWER, WAIT_S, Scene, StartScene, ask, end_of, granted, speak


def busy(scene: Scene, *, tokens: int = 1_000, tokens_per_s: float = 1_000.0) -> None:
    """The prefill worker tells that it has prompts of another router."""
    status = scene.prefill.status
    status.num_outstanding_prefill_tokens, status.prefill_tokens_per_s = tokens, tokens_per_s
    status.num_running = status.num_waiting = 1 if tokens else 0
    scene.prefill.say_status()


async def knows_its_load(scene: Scene, tokens: int) -> None:
    (link,) = scene.router.pool.prefills.values()
    async with asyncio.timeout(WAIT_S):
        while link.status.num_outstanding_prefill_tokens != tokens:
            await asyncio.sleep(0.002)


async def answered(scene: Scene, asked: list[Any]) -> None:
    """Let the prompts that a worker has been sent come to their ends."""
    for task, (prefill, work) in asked:
        prefill.first_token(work, ANSWER[0])
        speak(scene.decode, work, 1, len(ANSWER))
        await end_of(task)


async def test_a_first_token_that_would_come_too_late_is_refused_at_once(start_scene: StartScene) -> None:
    scene = await start_scene(ttft_target_s=5.0)
    busy(scene, tokens=30_000)
    await knows_its_load(scene, 30_000)
    with pytest.raises(Overloaded, match="after about 30 s, the target is 5 s") as caught:
        await end_of(ask(scene))
    assert caught.value.retry_after_s == pytest.approx(25.0, abs=0.1)
    assert scene.router.metrics.overloaded._value.get() == 1
    scene.check_nothing_left()


async def test_who_waits_past_its_latest_start_is_told_so_and_not_timed_out(start_scene: StartScene) -> None:
    scene = await start_scene(ttft_target_s=1.5)
    busy(scene)  # for a second, and then it does not get any better
    await knows_its_load(scene, 1_000)
    asked = [(ask(scene), await granted(scene)) for _ in range(2)]  # that each router may have at a busy worker
    with pytest.raises(Overloaded, match="waited so long for a worker"):
        await end_of(ask(scene))
    assert scene.decode.inbox.empty()
    await answered(scene, asked)
    scene.check_nothing_left()


async def test_the_queue_serves_the_important_first_and_then_each_tenant_in_turn(start_scene: StartScene) -> None:
    scene = await start_scene()
    busy(scene)
    await knows_its_load(scene, 1_000)
    asked = [(ask(scene), await granted(scene)) for _ in range(2)]  # that each router may have at a busy worker
    wanted = [("a", 0), ("a", 0), ("a", 0), ("b", 0), ("c", 1)]
    tasks = []
    for number, (tenant, priority) in enumerate(wanted):
        tasks.append(ask(scene, tenant=tenant, priority=priority))
        async with asyncio.timeout(WAIT_S):
            while scene.router.dispatcher.waiting.num_queued <= number:
                await asyncio.sleep(0.002)
    busy(scene, tokens=0)
    await answered(scene, asked)
    served = []
    for _ in wanted:
        prefill, work = await granted(scene)
        served.append((work.tenant, work.priority))
        prefill.first_token(work, ANSWER[0])
        speak(scene.decode, work, 1, len(ANSWER))
    assert served == [("c", 1), ("a", 0), ("b", 0), ("a", 0), ("a", 0)]
    for task in tasks:
        assert list((await end_of(task)).token_ids) == ANSWER
    scene.check_nothing_left()


async def test_a_fresh_prefill_worker_takes_what_would_wait_for_another(start_scene: StartScene) -> None:
    """A restarted worker has not measured its speed, and is taken to do as the others."""
    scene = await start_scene(prefill=2)
    first, fresh = scene.prefills
    first.status.prefill_tokens_per_s = 50_000.0
    first.say_status()
    await scene.heard(first)
    asked = [asyncio.create_task(scene.client.generate([10] * 3000, max_tokens=4, timeout_s=20.0)) for _ in range(4)]
    try:
        links = scene.router.pool.prefills
        async with asyncio.timeout(WAIT_S):
            while any(links[worker.address].load.outstanding_prompts < 2 for worker in (first, fresh)):
                await asyncio.sleep(0.002)
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
