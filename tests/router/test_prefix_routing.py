"""The router's view of prefix caches: told by workers, repaired after a gap, and used to place prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from splitserve.proto import worker_pb2
from splitserve.scheduling.policies.session import session
from splitserve.scheduling.prefix import prefix_hashes, prefix_namespace
from splitserve.scheduling.prefix_feed import block_key
from splitserve.scheduling.routing import Placement, RoutedRequest, Snapshot

from .conftest import LENGTH, WAIT_S, Scene, ScriptedWorker, StartScene

PROMPT = [3 + (7 * i) % 200 for i in range(200)]
KEYS = [
    block_key(each) for each in prefix_hashes(PROMPT, prefix_namespace(model_id="m", kv_dtype="float32", tenant=""))
]


def tell(worker: ScriptedWorker, number: int, *, restarts: bool = False, **blocks: list[int]) -> None:
    """One status with news of the prefix cache; those that follow have none."""
    worker.status.prefix_blocks.CopyFrom(worker_pb2.PrefixBlocks(number=number, restarts=restarts, **blocks))
    worker.say_status()
    worker.status.ClearField("prefix_blocks")


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not true():
            await asyncio.sleep(0.002)


def matched(scene: Scene) -> dict[str, int]:
    return scene.router.dispatcher._routing.index.match(KEYS)


async def serve(scene: Scene, prompt: list[int] = PROMPT) -> ScriptedWorker | None:
    """One request for one token; the prefill worker that it goes to, None if the decode worker does everything."""
    task = asyncio.create_task(scene.client.generate(prompt, max_tokens=1))
    decode = await scene.placed()
    kind, body = decode.inbox.get_nowait()
    prefill = None
    if kind == "grant":
        prefill = next(worker for worker in scene.prefills if worker.info.kv_address == body.kv_address)
        decode.grant(body.request)
        await prefill.receive("run")
        prefill.first_token(body.request, 7, finish=LENGTH)
    else:
        decode.tokens(body.request, 0, [7], finish=LENGTH)
    async with asyncio.timeout(WAIT_S):
        assert list((await task).token_ids) == [7]
    return prefill


async def test_a_prompt_goes_where_its_prefix_is_until_it_is_gone(start_scene: StartScene) -> None:
    scene = await start_scene(prefill=3)
    holder = scene.prefills[2]
    tell(holder, 1, restarts=True, added=KEYS[:8])
    await until(lambda: matched(scene) == {holder.address: 8})
    for _ in range(3):
        assert await serve(scene) is holder
    assert scene.router.metrics.expected_cached_tokens._value.get() == 3 * 128
    other = scene.prefills[0]
    tell(other, 1, restarts=True, added=KEYS[:10])
    tell(holder, 2, removed=KEYS[4:8])
    await until(lambda: matched(scene) == {other.address: 10, holder.address: 4})
    assert await serve(scene) is other
    scene.check_nothing_left()


async def test_other_tenants_do_not_match(start_scene: StartScene) -> None:
    scene = await start_scene(prefill=2)
    tell(scene.prefills[1], 1, restarts=True, added=KEYS)
    await until(lambda: bool(matched(scene)))
    task = asyncio.create_task(scene.client.generate(PROMPT, max_tokens=1, tenant="else"))
    await scene.decode.receive("grant")
    assert scene.router.metrics.expected_cached_tokens._value.get() == 0
    task.cancel()


async def test_after_a_gap_everything_is_asked_for_once_and_told_again(start_scene: StartScene) -> None:
    scene = await start_scene()
    worker = scene.prefill
    tell(worker, 1, restarts=True, added=KEYS[:2])
    await until(lambda: matched(scene) == {worker.address: 2})
    tell(worker, 3, added=KEYS[3:4])  # the second is missing
    tell(worker, 4, added=KEYS[4:5])
    await worker.receive("restart_prefix_blocks")
    assert matched(scene) == {worker.address: 2}
    tell(worker, 5, restarts=True, added=KEYS[:6])
    await until(lambda: matched(scene) == {worker.address: 6})
    assert worker.inbox.empty(), "one request is enough for both messages"


async def test_a_worker_that_dies_holds_nothing(start_scene: StartScene) -> None:
    scene = await start_scene(prefill=2)
    gone = scene.prefills[0]
    tell(gone, 1, restarts=True, added=KEYS)
    await until(lambda: bool(matched(scene)))
    await gone.die()
    await until(lambda: not matched(scene))
    assert await serve(scene) is scene.prefills[1]


async def test_short_prompts_are_computed_on_the_decode_worker_while_its_tokens_stay_even(
    start_scene: StartScene,
) -> None:
    """10,000 tokens/s beside a step of 20 ms: within 25 ms there is room for 50 tokens, cached ones not counted."""
    scene = await start_scene(local_prefill_itl_s=0.025, decode_changes={"local_prefill": True})
    decode = scene.decode
    reported = worker_pb2.WorkerStatus(prefill_tokens_per_s=1e4, decode_step_s=0.02, decode_batch=4, num_running=4)
    decode.status.MergeFrom(reported)
    tell(decode, 1, restarts=True)
    await until(lambda: next(iter(scene.router.pool.decodes.values())).load.num_sequences == 4)
    assert await serve(scene, PROMPT[:40]) is None
    assert await serve(scene, PROMPT[:60]) is scene.prefill
    tell(decode, 2, added=KEYS[:2])
    await until(lambda: matched(scene) == {decode.address: 2})
    assert await serve(scene, PROMPT[:60]) is None
    metrics = scene.router.metrics
    assert (metrics.local_prefills._value.get(), metrics.remote_prefills._value.get()) == (2, 1)


async def test_without_a_limit_every_prompt_goes_to_a_prefill_worker(start_scene: StartScene) -> None:
    scene = await start_scene(decode_changes={"local_prefill": True})
    scene.decode.status.MergeFrom(worker_pb2.WorkerStatus(prefill_tokens_per_s=1e6, decode_step_s=0.001))
    tell(scene.decode, 1, restarts=True)
    assert await serve(scene, PROMPT[:16]) is scene.prefill


async def test_a_policy_sees_the_session_and_the_time_that_is_left(start_scene: StartScene) -> None:
    scene = await start_scene(prefill=2)
    seen: list[RoutedRequest] = []

    def watched(snapshot: Snapshot) -> Placement | None:
        seen.append(snapshot.request)
        return session(snapshot)

    scene.router.dispatcher.waiting._policy = watched
    task = asyncio.create_task(scene.client.generate(PROMPT, max_tokens=1, session="ada", timeout_s=50.0))
    await scene.decode.receive("grant")
    task.cancel()
    other = asyncio.create_task(scene.client.generate(PROMPT[:50], max_tokens=1, session="ada", timeout_s=50.0))
    await scene.decode.receive("grant")
    other.cancel()
    assert seen[0].session == seen[-1].session != b""
    assert [request.ttft_slack_s for request in seen] == [pytest.approx(50.0, abs=20.0)] * len(seen)


async def test_blocks_that_no_hash_ends_with_are_nobodys_prefix(start_scene: StartScene) -> None:
    scene = await start_scene()
    for link in scene.router.pool:
        assert link.info is not None
        link.info.block_size = 8
    assert await serve(scene) is scene.prefill
