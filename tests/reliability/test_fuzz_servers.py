"""Random messages at the handlers of real workers and a real router: answered, refused or counted, never a crash."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop
from splitserve.core.errors import ProtocolMismatch, WorkerLost
from splitserve.core.request import Request
from splitserve.decode_worker.server import DecodeServer
from splitserve.engine.engine import Engine
from splitserve.engine.options import EngineOptions
from splitserve.prefill_worker.server import PrefillServer
from splitserve.proto import inference_pb2, kv_transfer_pb2, worker_pb2
from splitserve.router.prefill_link import PrefillLink
from splitserve.router.server import Router, RouterOptions
from splitserve.router.session import WorkerLink
from splitserve.worker.options import Role, WorkerOptions
from splitserve.worker.session import Session

from .random_messages import fill, readable

CASES = pytest.mark.parametrize("num_cases", [1_500, pytest.param(34_000, marks=pytest.mark.verify)])
PAUSE = 50  # messages until the event loop and the engine get a turn
WAIT_S = 60.0
REQUESTS = ("r", "a", "b")


@pytest.fixture(autouse=True)
def no_traceback(caplog: pytest.LogCaptureFixture) -> Any:
    """What is caught at the top of a loop and logged with its traceback was a crash."""
    yield
    crashes = [record for record in caplog.get_records("call") if record.exc_info or record.levelno >= logging.ERROR]
    assert not crashes, [record.getMessage() for record in crashes]


def on_uvloop(main: Callable[[], Awaitable[None]]) -> None:
    """As every role runs: uvloop's timers and transports refuse other values than asyncio's."""

    async def run() -> None:
        await main()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


def work(choose: random.Random) -> worker_pb2.WorkRequest:
    """A request that a worker would take, but for what is random about it."""
    message = worker_pb2.WorkRequest()
    if choose.random() < 0.4:
        fill(choose, message)
    message.request_id, message.attempt = choose.choice(REQUESTS), choose.randrange(4)
    if choose.random() < 0.8:
        del message.prompt_token_ids[:]
        message.prompt_token_ids.extend(choose.choices(range(256), k=choose.randrange(1, 60)))
    if choose.random() < 0.8:
        message.max_tokens, message.timeout_s = choose.randrange(1, 9), choose.choice((0.001, 0.5, 30.0))
    return message


def prefill_message(choose: random.Random) -> worker_pb2.PrefillSessionRequest:
    message = readable(choose, worker_pb2.PrefillSessionRequest)
    if choose.random() < 0.5:
        message.run.request.CopyFrom(work(choose))
        grant = message.run.grant
        if choose.random() < 0.8:
            grant.CopyFrom(sound_grant(choose))
            grant.num_tokens = len(message.run.request.prompt_token_ids) + len(message.run.request.output_token_ids)
        grant.attempt = message.run.request.attempt
    elif choose.random() < 0.3:
        message.cancel.request_id, message.cancel.attempt = choose.choice(REQUESTS), choose.randrange(9)
    return message


def sound_grant(choose: random.Random) -> kv_transfer_pb2.Grant:
    ranks = {"prefill_ranks": 1, "decode_ranks": choose.choice((1, 1, 1, 0, 2, 3))}
    return kv_transfer_pb2.Grant(grant_id=choose.randbytes(16).hex(), codec="none", wire_dtype="float32", **ranks)


def decode_message(choose: random.Random, addresses: list[str]) -> worker_pb2.DecodeSessionRequest:
    message = readable(choose, worker_pb2.DecodeSessionRequest)
    kind = choose.randrange(4)
    if kind == 0:
        message.run.request.CopyFrom(work(choose))
    elif kind == 1:
        message.grant.request.CopyFrom(work(choose))
        message.grant.kv_address = choose.choice(addresses)
    elif kind == 2 and choose.random() < 0.3:
        message.cancel.request_id, message.cancel.attempt = choose.choice(REQUESTS), choose.randrange(9)
    return message


def options(model: Path, role: Role) -> WorkerOptions:
    engine = EngineOptions(model=str(model), dtype="float32", num_kv_blocks=64, num_threads=1, self_check=False)
    return WorkerOptions(engine=engine, role=role, transports=("grpc",), lease_s=0.5)


async def is_idle(engine: Engine) -> None:
    """Every block comes back: free or cached."""
    async with asyncio.timeout(WAIT_S):
        while (usage := engine.usage()).blocks_free + usage.blocks_cached < usage.blocks_total:
            await asyncio.sleep(0.01)
    assert engine.num_orphaned_blocks() == 0


@CASES
def test_a_prefill_worker_survives_any_message(tiny: Path, num_cases: int) -> None:
    async def main() -> None:
        server = PrefillServer(options(tiny, "prefill"))
        host = server.worker.host
        try:
            await host.start()
            choose = random.Random(num_cases)
            session: Any = Session("fuzz", lambda _: worker_pb2.PrefillSessionResponse(status=host.status()))
            for number in range(num_cases):
                message = prefill_message(choose)
                if message.WhichOneof("message") == "run" and choose.random() < 0.8:
                    message.run.grant.prefill_boot_id = host.identity.boot_id
                    message.run.grant.geometry_digest = host.engine.geometry.digest()
                server._handle(session, message)
                if number % PAUSE == 0:
                    await asyncio.sleep(0.001)
                    session._outbox.clear()
            assert host.engine.num_steps > 0
            server.worker.session_ended(session)
            await is_idle(host.engine)
            assert host.num_runs == 0
        finally:
            await server.worker.stop()

    on_uvloop(main)


@CASES
def test_a_decode_worker_survives_any_message(tiny: Path, num_cases: int) -> None:
    async def main() -> None:
        server, prefill = DecodeServer(options(tiny, "colocated")), PrefillServer(options(tiny, "prefill"))
        host = server.worker.host
        try:
            ready = await prefill.worker.host.start()
            await host.start()
            choose = random.Random(num_cases)
            session: Any = Session("fuzz", lambda _: worker_pb2.DecodeSessionResponse(status=host.status()))
            for number in range(num_cases):
                server._handle(session, decode_message(choose, ["nonsense", "127.0.0.1:1", ready.address]))
                if number % PAUSE == 0:
                    await asyncio.sleep(0.001)
                    session._outbox.clear()
            assert host.engine.num_steps > 0
            server.worker.session_ended(session)
            await is_idle(host.engine)
            assert host.num_runs == 0
        finally:
            await server.worker.stop()
            await prefill.worker.stop()

    on_uvloop(main)


def told(choose: random.Random, link: WorkerLink, live: Request) -> Any:
    """What a worker might say, about requests that live or not."""
    message = readable(
        choose, worker_pb2.PrefillSessionResponse if link.role == "prefill" else worker_pb2.DecodeSessionResponse
    )
    kind = message.WhichOneof("message")
    body = getattr(message, kind) if kind else None
    for row in getattr(body, "sequences", None) or [body]:
        if hasattr(row, "request_id") and choose.random() < 0.8:
            row.request_id, row.attempt = live.request_id, live.attempt + choose.choice((0, 0, 0, 1))
        if hasattr(row, "index") and choose.random() < 0.8:
            row.index = choose.randrange(4)
        if hasattr(row, "token_ids") and choose.random() < 0.6:  # what an honest worker says
            row.index, row.token_ids[:] = 0, [7, 8, 9, 10]
            row.finish_reason = inference_pb2.FINISH_REASON_LENGTH
    return message


def introduce(link: WorkerLink, model: Path) -> None:
    """Hello and room for everything."""
    role = worker_pb2.ROLE_PREFILL if link.role == "prefill" else worker_pb2.ROLE_DECODE
    info = worker_pb2.WorkerInfo(role=role, model=str(model), geometry_digest="g", block_size=16)
    status = worker_pb2.WorkerStatus(num_blocks=99, num_free_blocks=99, prefill_tokens_per_s=1e4)
    kind = worker_pb2.PrefillSessionResponse if link.role == "prefill" else worker_pb2.DecodeSessionResponse
    link.take(kind(hello=info))
    link.take(kind(status=status))


def lose(link: WorkerLink) -> None:
    """Its session ended."""
    link.info = None
    link._events.lost(link, WorkerLost("gone"))
    link.runs.clear()


@CASES
def test_a_router_survives_whatever_its_workers_say(tiny: Path, num_cases: int) -> None:
    async def main() -> None:
        router = Router(RouterOptions(model=str(tiny), port=0))
        choose = random.Random(num_cases)
        pool, dispatcher = router.pool, router.dispatcher
        for number in (1, 2):
            address = f"127.0.0.1:{number}"
            pool.prefills[address] = PrefillLink(address, "router", dispatcher, pool._judge)
            pool.decodes[address] = pool._decode_link(address, dispatcher)
        links = list(pool)
        num_answered = num_sessions = 0
        for number in range(num_cases):
            for link in links:
                introduce(link, tiny)  # whatever it said about its load before: admission believes it
            now = asyncio.get_running_loop().time()
            request = Request(request_id=f"r{number}", prompt_token_ids=(1, 2, 3), max_tokens=4)
            with dispatcher.open(request, arrived_at=now, deadline_at=now + WAIT_S) as reading:
                job = reading.job
                for _ in range(choose.randrange(1, 12)):
                    link = choose.choice(links)
                    try:
                        if link.info is not None:
                            link.take(told(choose, link, job.request))
                    except ProtocolMismatch:
                        num_sessions += 1
                        lose(link)
                    if choose.random() < 0.02:
                        lose(link)
                num_answered += job.answer.finish_reason is not None
            assert job.answer.ended
            for link in links:
                while not link._outbox.empty():
                    link._outbox.get_nowait()
        assert num_answered > 0 < num_sessions
        assert dispatcher.num_live == dispatcher.waiting.num_queued == 0
        await router.stop()

    on_uvloop(main)
