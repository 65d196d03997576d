"""Workers that do not fit are refused with the reason; one in the wrong list is found all the same."""

from __future__ import annotations

import asyncio

import grpc.aio
import pytest
from splitserve.proto import worker_pb2
from splitserve.proto.convert import PROTOCOL_VERSION

from .conftest import ANSWER, WAIT_S, ScriptedWorker, StartScene, ask, end_of, granted, speak


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("role", worker_pb2.ROLE_PREFILL, "is a prefill worker"),
        ("model", "another", "serves model 'another'"),
        ("protocol_version", PROTOCOL_VERSION + 1, "protocol"),
    ],
    ids=["role", "model", "future"],
)
async def test_a_worker_that_does_not_fit_is_refused_with_the_reason(
    start_scene: StartScene, field: str, value: object, reason: str
) -> None:
    scene = await start_scene()
    odd = ScriptedWorker("decode", scene.decode.info.model)
    setattr(odd.info, field, value)
    await odd.start()
    try:
        scene.router.pool.set_workers(
            [scene.prefill.address], [scene.decode.address, odd.address], scene.router.dispatcher
        )
        assert reason in await scene.becomes(odd.address, "refused")
        task = ask(scene)
        prefill, work = await granted(scene)
        prefill.first_token(work, ANSWER[0])
        speak(scene.decode, work, 1, len(ANSWER))
        assert list((await end_of(task)).token_ids) == ANSWER
        assert odd.inbox.empty()
    finally:
        await odd.die()


async def test_a_worker_that_speaks_before_its_hello_is_refused(start_scene: StartScene) -> None:
    scene = await start_scene()
    await scene.decode.die()
    scene.decode.says_hello = False
    await scene.decode.start()
    assert "before its hello" in await scene.becomes(scene.decode.address, "refused")


async def test_a_worker_is_found_under_the_role_that_it_has_and_not_that_it_is_listed_with(
    start_scene: StartScene,
) -> None:
    scene = await start_scene(prefill=2)
    moved = scene.prefills[1].address
    scene.router.pool.set_workers([scene.prefill.address], [scene.decode.address, moved], scene.router.dispatcher)
    async with asyncio.timeout(WAIT_S):
        while moved in scene.router.pool.decodes or moved not in scene.router.pool.prefills:
            await asyncio.sleep(0.01)
    await scene.becomes(moved, "ready")
    assert (await scene.client.status()).workers[1].role == "prefill"


async def test_what_speaks_neither_dialect_is_refused(start_scene: StartScene) -> None:
    scene, server = await start_scene(), grpc.aio.server()
    stranger = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        scene.router.pool.set_workers(
            [scene.prefill.address], [scene.decode.address, stranger], scene.router.dispatcher
        )
        assert "nothing at" in await scene.becomes(stranger, "refused")
    finally:
        await server.stop(0)


async def test_a_worker_on_a_broken_device_is_refused_with_the_reason(start_scene: StartScene) -> None:
    scene = await start_scene()
    scene.prefill.status.fault = "2 uncorrectable memory errors"
    scene.prefill.say_status()
    assert "out of service: 2 uncorrectable memory errors" in await scene.becomes(scene.prefill.address, "refused")
