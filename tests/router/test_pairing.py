"""An old and a new version side by side: both serve, no request is split between them or goes on with other weights."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from splitserve.client import SplitserveError
from splitserve.router.job import Phase
from splitserve.router.patience import Patience
from splitserve.scheduling.fair_queue import FairQueue

from .conftest import ANSWER, WAIT_S, Scene, StartScene, ask, end_of, granted, speak


async def upgrade(scene: Scene) -> None:
    """The second worker of each pool comes back as another version."""
    for worker in (scene.prefills[1], scene.decodes[1]):
        await worker.die()
        worker.info.geometry_digest = "new"
        await worker.start()
    async with asyncio.timeout(WAIT_S):
        while scene.router.pool.ready_weights != {"g", "new"}:
            await asyncio.sleep(0.01)


def drain(scene: Scene, index: int, draining: bool = True) -> None:
    worker = scene.decodes[index]
    worker.status.draining = draining
    worker.say_status()


async def test_an_answer_goes_on_with_the_weights_that_began_it_while_others_are_served(
    start_scene: StartScene,
) -> None:
    scene = await start_scene(prefill=2, decode=2, no_worker_wait_s=60.0, max_attempts=1)
    await upgrade(scene)
    old_decode, new_decode = scene.decodes
    drain(scene, 1)
    await scene.becomes(new_decode.address, "draining")
    task = ask(scene)
    prefill, work = await granted(scene, old_decode)
    assert prefill is scene.prefills[0], "a pair is of one group"
    prefill.first_token(work, ANSWER[0])
    drain(scene, 1, draining=False)
    await scene.becomes(new_decode.address, "ready")
    drain(scene, 0)
    old_decode.fail(work, "draining")
    await scene.becomes(old_decode.address, "draining")

    other = ask(scene)
    prefill, second = await granted(scene, new_decode)
    assert prefill is scene.prefills[1]
    assert not second.output_token_ids, "what the old version began waits for it"
    prefill.first_token(second, ANSWER[0])
    speak(new_decode, second, 1, len(ANSWER))
    assert list((await end_of(other)).token_ids) == ANSWER

    drain(scene, 0, draining=False)
    prefill, again = await granted(scene, old_decode)
    assert (prefill, list(again.output_token_ids)) == (scene.prefills[0], ANSWER[:1])
    prefill.first_token(again, ANSWER[1])
    speak(old_decode, again, 2, len(ANSWER))
    assert list((await end_of(task)).token_ids) == ANSWER
    scene.check_nothing_left()


async def test_an_answer_whose_weights_are_gone_ends_with_a_typed_error(start_scene: StartScene) -> None:
    scene = await start_scene(prefill=2, decode=2, no_worker_wait_s=0.3)
    await upgrade(scene)
    old_decode, new_decode = scene.decodes
    drain(scene, 1)
    await scene.becomes(new_decode.address, "draining")
    task = ask(scene)
    prefill, work = await granted(scene, old_decode)
    prefill.first_token(work, ANSWER[0])
    drain(scene, 1, draining=False)
    await scene.becomes(new_decode.address, "ready")
    await old_decode.die()
    with pytest.raises(SplitserveError, match="no worker is ready that has the weights"):
        await end_of(task)
    assert new_decode.inbox.empty()
    scene.check_nothing_left()


async def test_a_worker_without_a_counterpart_says_so(start_scene: StartScene) -> None:
    scene = await start_scene(prefill=1, decode=2)
    odd = scene.decodes[1]
    await odd.die()
    odd.info.geometry_digest = "new"
    await odd.start()
    async with asyncio.timeout(WAIT_S):
        while "no worker of the other role" not in (await scene.state(odd.address))[1]:
            await asyncio.sleep(0.01)
    task = ask(scene)
    prefill, work = await granted(scene, scene.decodes[0])
    prefill.first_token(work, ANSWER[0])
    speak(scene.decodes[0], work, 1, len(ANSWER))
    assert list((await end_of(task)).token_ids) == ANSWER
    assert odd.inbox.empty()


async def test_who_found_its_weights_again_has_all_its_time_if_they_go_once_more() -> None:
    ready: set[str] = set()
    pool = SimpleNamespace(ready_weights=ready, usable=True, refresh=lambda: None)
    job = Mock(weights="old", phase=Phase.QUEUED)
    ended: list[object] = []
    patience = Patience(pool, FairQueue(ageing_s=1.0), wait_s=0.05, end=lambda each, _: ended.append(each))
    patience.queued([job])
    first = patience._stranded[job]
    ready.add("old")
    patience.queued([job])
    assert first.cancelled()
    ready.clear()
    patience.queued([job])
    async with asyncio.timeout(WAIT_S):
        while not ended:
            await asyncio.sleep(0.002)
    assert ended == [job]
