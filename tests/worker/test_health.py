"""Health is progress: a step or an event loop that hangs shows at once everywhere, and ends its process in the end."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import urllib.error
import urllib.request
import weakref
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from splitserve.core.pulse import Pulse
from splitserve.core.request import Request
from splitserve.engine.options import EngineOptions
from splitserve.prefill_worker.server import PrefillServer
from splitserve.worker.options import WorkerOptions
from splitserve.worker.watchdog import EXIT_CODE, Watchdog

from .conftest import WAIT_S, OpenPair, Pair, held_step

PROMPT = tuple(3 + (7 * i) % 200 for i in range(20))


def ask(metrics_address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{metrics_address}{path}", timeout=WAIT_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


async def becomes(metrics_address: str, path: str, status: int) -> str:
    """Wait for an answer of this status; returns what it says."""
    async with asyncio.timeout(WAIT_S):
        while True:
            got, text = await asyncio.to_thread(ask, metrics_address, path)
            if got == status:
                return text
            await asyncio.sleep(0.02)


async def grpc_health(pair: Pair, service: str, wanted: int) -> None:
    async with grpc.aio.insecure_channel(pair.prefill.worker.host.rpc.address) as channel, asyncio.timeout(WAIT_S):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service))
        async for answer in watch:
            if answer.status == wanted:
                return


async def test_a_step_that_hangs_turns_its_worker_unhealthy_until_it_goes_on(
    open_pair: OpenPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitserve.worker.host._HEALTH_PERIOD_S", 0.05)
    pair = await open_pair(stall_bound_s=0.3)
    host = pair.prefill.worker.host
    await pair.serve(Request(request_id="warm", prompt_token_ids=PROMPT, max_tokens=2, timeout_s=60.0))
    states = health_pb2.HealthCheckResponse
    assert await becomes(pair.prefill_metrics, "/healthz", 200) == "ok\n"
    work = Request(request_id="r", prompt_token_ids=PROMPT[::-1], max_tokens=2, timeout_s=60.0)
    ended: list[int] = []
    told = threading.Event()
    with held_step(pair.prefill):
        await pair.prefill_run(work, await pair.grant(work))
        for path in ("/healthz", "/readyz"):
            assert "no step finished" in await becomes(pair.prefill_metrics, path, 503)
        await grpc_health(pair, "splitserve.v1.PrefillWorker", states.NOT_SERVING)
        assert host.status().stalled
        watchdog = Watchdog(lambda: host.stuck, 0.1, end=lambda code: (ended.append(code), told.set()), look_s=0.05)
        watchdog.start()
        assert await asyncio.to_thread(told.wait, WAIT_S)
    assert ended == [EXIT_CODE]
    await becomes(pair.prefill_metrics, "/healthz", 200)
    await grpc_health(pair, "splitserve.v1.PrefillWorker", states.SERVING)
    await pair.prefill_end.next("first_token")


async def test_a_draining_worker_is_alive_and_not_ready(pair: Pair) -> None:
    await pair.prefill.worker.host.drain(0.0)
    assert "draining" in await becomes(pair.prefill_metrics, "/readyz", 503)
    assert await becomes(pair.prefill_metrics, "/healthz", 200) == "ok\n"
    await pair.prefill.worker.host.undrain()
    await becomes(pair.prefill_metrics, "/readyz", 200)


async def test_health_is_told_of_the_services_of_the_role_alone(pair: Pair) -> None:
    states = health_pb2.HealthCheckResponse
    await grpc_health(pair, "", states.SERVING)
    await grpc_health(pair, "splitserve.v1.KvTransfer", states.SERVING)
    await grpc_health(pair, "splitserve.v1.DecodeWorker", states.NOT_SERVING)


async def test_an_event_loop_that_does_not_run_is_seen_from_another_thread() -> None:
    pulse = Pulse(0.0)
    pulse.start()
    seen: list[str] = []
    hung = threading.Event()

    def look() -> None:
        while not (silence := pulse.silence()):
            time.sleep(0.01)
        seen.append(silence)
        hung.set()

    threading.Thread(target=look, daemon=True).start()
    assert hung.wait(WAIT_S)  # the loop stands still here
    assert "event loop" in seen[0]
    pulse.start()
    assert pulse.silence() == ""
    pulse.stop()


def test_a_watchdog_waits_for_what_recovers() -> None:
    """A process that was stopped for a while looks stuck once; only what stays so is ended."""
    looks = iter(["stopped", "stopped", "", "stuck", "stuck", "stuck"])
    ended = threading.Event()
    left: list[int] = []

    def stuck() -> str:
        return next(looks, "stuck")

    def end(code: int) -> None:
        left.append(len(list(looks)))
        ended.set()

    Watchdog(stuck, 0.03, end=end, look_s=0.01).start()
    assert ended.wait(WAIT_S)
    assert left == [0]


async def test_a_stopped_worker_leaves_no_pool_behind(model_dir: Path) -> None:
    """Whoever has workers in one process, as tests do, would run out of memory."""
    engine = EngineOptions(model=str(model_dir), num_threads=1, num_kv_blocks=64, self_check=False)
    server = PrefillServer(WorkerOptions(engine=engine, role="prefill"))
    address = (await server.worker.host.start()).metrics_address
    assert (await asyncio.to_thread(ask, address, "/healthz"))[0] == 200
    pool = weakref.ref(server.worker.host.engine.pool)
    await server.worker.stop()
    del server
    async with asyncio.timeout(WAIT_S):
        while pool() is not None:
            await asyncio.sleep(0.1)
            gc.collect()
    with pytest.raises(urllib.error.URLError):
        await asyncio.to_thread(ask, address, "/healthz")
