"""A worker that died and was taken off the list still has a row; one that was retired in order has none."""

from __future__ import annotations

import asyncio

from splitserve.router.departed import KEPT_S, MAX_KEPT, Departed

from .conftest import WAIT_S, Scene, StartScene


async def rows(scene: Scene) -> dict[str, str]:
    """State of each worker by its name."""
    return {worker.worker_id: worker.state for worker in (await scene.client.status()).workers}


async def test_a_dead_worker_keeps_its_row_when_it_is_taken_off_the_list(start_scene: StartScene) -> None:
    scene = await start_scene(decode=3)
    kept, dead, retired = scene.decodes
    for worker, name in ((kept, "kept"), (dead, "dead"), (retired, "retired")):
        worker.info.worker_id = name
        await worker.die()
        await worker.start()
    ready = {"prefill": "ready", "kept": "ready", "dead": "ready", "retired": "ready"}
    async with asyncio.timeout(WAIT_S):
        while await rows(scene) != ready:
            await asyncio.sleep(0.01)
    await dead.die()
    await scene.becomes(dead.address, "connecting")
    scene.router.pool.set_workers([scene.prefill.address], [kept.address], scene.router.dispatcher)
    async with asyncio.timeout(WAIT_S):
        while await rows(scene) != {"prefill": "ready", "kept": "ready", "dead": "gone"}:
            await asyncio.sleep(0.01)
    kept.info.worker_id = "dead"  # it serves again, elsewhere
    await kept.die()
    await kept.start()
    async with asyncio.timeout(WAIT_S):
        while await rows(scene) != {"prefill": "ready", "dead": "ready"}:
            await asyncio.sleep(0.01)


def test_rows_of_the_departed_are_bounded_in_number_and_time() -> None:
    departed = Departed()
    for number in range(MAX_KEPT + 5):
        departed.add(address=f"h:{number}", role="decode", worker_id=str(number), reason="lost", now=0.0)
    assert len(departed.shown(addresses=(), worker_ids=(), now=1.0)) == MAX_KEPT
    assert departed.shown(addresses=(), worker_ids=(), now=KEPT_S) == []
