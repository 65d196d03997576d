"""Malformed requests: each ends with a typed error, none reaches a worker, and nothing is left of them."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from splitserve.core.errors import BY_CODE
from splitserve.proto.rpc import ERROR_KEY

from .conftest import WAIT_S, Scene, StartScene
from .malformed import Message, malformed, sound

METHOD = "/splitserve.v1.Inference/Generate"
WRONG = {"invalid_request", "prompt_too_long", "model_not_found", "protocol_mismatch"}


async def send(call: Any, data: bytes) -> tuple[grpc.StatusCode, str]:
    """How one call ends: its status and the code of its typed error, empty if it has none."""
    stream = call(data, timeout=WAIT_S)
    try:
        async for _ in stream:
            stream.cancel()
            return grpc.StatusCode.OK, ""
    except grpc.aio.AioRpcError as error:
        return error.code(), dict(error.trailing_metadata() or ()).get(ERROR_KEY, "")
    return await stream.code(), ""


async def check(scene: Scene, count: int, seed: int) -> None:
    choose = random.Random(seed)
    identity: Any = lambda data: data  # noqa: E731
    call = scene.client._channels[scene.client.address].unary_stream(
        METHOD, request_serializer=identity, response_deserializer=identity
    )
    for begin in range(0, count, 50):
        batch = [malformed(choose) for _ in range(min(50, count - begin))]
        for data, (status, code) in zip(batch, await asyncio.gather(*(send(call, d) for d in batch)), strict=True):
            assert code in WRONG, (status, code, Message.FromString(data) if code else data)
            assert status.name == BY_CODE[code].grpc_code
    assert scene.prefill.inbox.empty()
    assert scene.decode.inbox.empty()
    scene.check_nothing_left()


async def test_malformed_requests_end_with_a_typed_error(start_scene: StartScene) -> None:
    await check(await start_scene(), 400, seed=0)


@pytest.mark.verify
async def test_ten_thousand_malformed_requests_leave_nothing_behind(start_scene: StartScene) -> None:
    scene = await start_scene()
    await check(scene, 2_000, seed=1)  # caches fill
    before = resident_bytes()
    await check(scene, 8_000, seed=2)
    assert resident_bytes() - before < 16 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("name", ["Generate", "Tokenize", "Detokenize", "Cancel", "ListModels"])
async def test_what_cannot_be_read_is_a_typed_error_of_every_method(start_scene: StartScene, name: str) -> None:
    scene = await start_scene()
    identity: Any = lambda data: data  # noqa: E731
    method = METHOD.replace("Generate", name)
    call = scene.client._channels[scene.client.address].unary_stream(
        method, request_serializer=identity, response_deserializer=identity
    )
    for data in (bytes([0x0A, 100, 1]), bytes([0x0A, 2, 0xC3, 0x28])):
        if name == "ListModels" and data[1] == 2:
            continue  # it has no text
        assert await send(call, data) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_request")


async def test_bytes_at_random_end_with_an_answer_or_a_typed_error(start_scene: StartScene) -> None:
    """Flipped bits may well give a sound request: then it is one like any other."""
    scene, choose = await start_scene(), random.Random(3)
    identity: Any = lambda data: data  # noqa: E731
    call = scene.client._channels[scene.client.address].unary_stream(
        METHOD, request_serializer=identity, response_deserializer=identity
    )
    for _ in range(200):
        data = bytearray(sound(choose).SerializeToString())
        for _ in range(choose.randrange(1, 6)):
            data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        status, code = await send(call, bytes(data))
        assert status is grpc.StatusCode.OK or code in WRONG
