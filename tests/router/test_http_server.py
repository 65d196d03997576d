"""The HTTP server of a router without workers, or with scripted ones: refusals, failures, and clients that go away."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import pytest_asyncio
from splitserve.core.errors import AddressInUse
from splitserve.router.server import Router, RouterOptions

from .conftest import LENGTH, Scene, StartScene


@pytest_asyncio.fixture
async def router(tiny: Path) -> AsyncIterator[Router]:
    router = Router(RouterOptions(model=str(tiny), port=0, http_port=0, no_worker_wait_s=0.05))
    await router.start()
    yield router
    await router.stop()


async def test_without_workers_it_is_alive_and_says_what_is_missing(router: Router, tiny: Path) -> None:
    async with httpx2.AsyncClient(base_url=f"http://{router.http_address}") as http:
        assert (await http.get("/health")).status_code == 503
        assert (await http.get("/v1/models")).json()["data"] == []
        refused = await http.post("/v1/completions", json={"model": str(tiny), "prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert refused.headers["x-should-retry"] == "true"
        assert int(refused.headers["retry-after-ms"]) > 0
        assert "splitserve_live_requests 0.0" in (await http.get("/metrics")).text
        assert (await http.get("/openapi.json")).json()["openapi"] == "3.1.0"


async def test_connections_do_not_wait_for_acknowledgements(router: Router) -> None:
    async with httpx2.AsyncClient(base_url=f"http://{router.http_address}") as http:
        await http.get("/health")
        (accepted,) = router._http._server.server_state.connections
        connection = accepted.transport.get_extra_info("socket")
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_a_port_in_use_is_named(router: Router, tiny: Path) -> None:
    port = int(router.http_address.rpartition(":")[2])
    with pytest.raises(AddressInUse, match=f"127.0.0.1:{port}.*--http-port"):
        Router(RouterOptions(model=str(tiny), port=0, http_port=port))


def completion(scene: Scene, **body: Any) -> dict[str, Any]:
    return {"model": scene.router.options.model, "prompt": "abc", "max_tokens": 4, "temperature": 0, **body}


async def test_what_fails_after_the_first_token_is_the_stream_s_last_event(start_scene: StartScene) -> None:
    scene = await start_scene(prefill=0, decode=0, colocated=1, http_port=0)
    async with openai.AsyncOpenAI(
        base_url=f"http://{scene.router.http_address}/v1", api_key="none", max_retries=0
    ) as client:
        asking = asyncio.create_task(client.completions.create(**completion(scene), stream=True))
        work = (await scene.decode.receive("run")).request
        scene.decode.tokens(work, 0, [64])
        stream = await asking
        assert (await anext(stream)).choices[0].text == "a"
        scene.decode.fail(work, "internal", "as the test says")
        with pytest.raises(openai.APIError, match="as the test says") as caught:
            await anext(stream)
        assert caught.value.body["type"] == "server_error"
    scene.check_nothing_left()


async def test_what_fails_before_the_first_token_has_its_status(start_scene: StartScene) -> None:
    scene = await start_scene(prefill=0, decode=0, colocated=1, http_port=0, max_attempts=1)
    async with httpx2.AsyncClient(base_url=f"http://{scene.router.http_address}") as http:
        for stream in (True, False):
            asking = asyncio.create_task(http.post("/v1/completions", json=completion(scene, stream=stream)))
            scene.decode.fail((await scene.decode.receive("run")).request, "transfer_failed")
            answer = await asking
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "transfer_failed")


async def test_a_full_router_is_429_and_says_when_to_come_back(start_scene: StartScene) -> None:
    scene = await start_scene(prefill=0, decode=0, colocated=1, http_port=0, max_live=1)
    async with httpx2.AsyncClient(base_url=f"http://{scene.router.http_address}") as http:
        first = asyncio.create_task(http.post("/v1/completions", json=completion(scene)))
        work = (await scene.decode.receive("run")).request
        refused = await http.post("/v1/completions", json=completion(scene))
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(refused.headers["retry-after"]) >= 1
        scene.decode.tokens(work, 0, [64], finish=LENGTH)
        assert (await first).json()["choices"][0]["text"] == "a"


async def test_one_failed_answer_of_several_cancels_the_others(start_scene: StartScene) -> None:
    scene = await start_scene(prefill=0, decode=0, colocated=1, http_port=0, max_attempts=1)
    async with httpx2.AsyncClient(base_url=f"http://{scene.router.http_address}") as http:
        asking = asyncio.create_task(http.post("/v1/completions", json=completion(scene, n=3)))
        works = [(await scene.decode.receive("run")).request for _ in range(3)]
        assert len({work.sampling.seed for work in works}) == 3
        scene.decode.fail(works[1], "internal")
        assert (await asking).status_code == 500
        cancelled = {(await scene.decode.receive_cancel()).request_id for _ in range(2)}
        assert cancelled == {works[0].request_id, works[2].request_id}
    scene.check_nothing_left()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_hangs_up_cancels_its_request(start_scene: StartScene, stream: bool) -> None:
    scene = await start_scene(prefill=0, decode=0, colocated=1, http_port=0)
    async with httpx2.AsyncClient(base_url=f"http://{scene.router.http_address}") as http:
        asking = asyncio.create_task(http.post("/v1/completions", json=completion(scene, stream=stream)))
        work = (await scene.decode.receive("run")).request
        if stream:
            scene.decode.tokens(work, 0, [64])
        asking.cancel()
        assert (await scene.decode.receive_cancel()).request_id == work.request_id
    scene.check_nothing_left()


async def test_a_stopping_router_ends_its_streams_with_an_error(start_scene: StartScene) -> None:
    scene = await start_scene(prefill=0, decode=0, colocated=1, http_port=0)
    async with httpx2.AsyncClient(base_url=f"http://{scene.router.http_address}") as http:
        asking = asyncio.create_task(http.post("/v1/completions", json=completion(scene, stream=True)))
        scene.decode.tokens((await scene.decode.receive("run")).request, 0, [64])
        await scene.router.stop()
        answer = await asking
        error = answer.json()["error"] if answer.status_code != 200 else json.loads(answer.text.split("data: ")[-1])
    assert "shutting down" in str(error)
