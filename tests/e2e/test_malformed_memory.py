"""Malformed gRPC requests at a router and at both workers: each gets a typed error, and no process grows."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest
from splitserve.benchmarks.processes import ProcessCluster
from splitserve.benchmarks.soak import KIB_PER_1000, slope_per_1000
from splitserve.core.errors import BY_CODE
from splitserve.proto import worker_pb2, worker_pb2_grpc
from splitserve.proto.convert import PROTOCOL_VERSION
from splitserve.proto.rpc import CHANNEL_OPTIONS, ERROR_KEY

from ..router.malformed import malformed
from .conftest import WAIT_S

logger = logging.getLogger(__name__)

GENERATE = "/splitserve.v1.Inference/Generate"
BATCH = 50
NUM_SAMPLES = 20
WARM_UP = 17_000  # caches and bounded tables fill up: the largest is a worker's ring of 16,384 events
Send = Callable[[random.Random, int], Awaitable[Counter[str]]]  # sends so many; the codes that came back


@pytest.mark.parametrize("num_requests", [200, pytest.param(10_000, marks=pytest.mark.verify)])
@pytest.mark.parametrize("target", ["router", "prefill-0", "decode-0"])
@pytest.mark.timeout(1200)
async def test_malformed_requests_leave_memory_flat(served: ProcessCluster, target: str, num_requests: int) -> None:
    address = (served.router if target == "router" else served.workers[target]).address
    processes = {name: psutil.Process(end.pid) for name, end in {"router": served.router, **served.workers}.items()}
    rss_kib: dict[str, list[int]] = {name: [] for name in processes}
    sent: list[int] = []
    choose, codes, is_long = random.Random(num_requests), Counter[str](), num_requests >= 10_000
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        send = at_router(channel) if target == "router" else at_worker(channel, target)
        if is_long:
            await send(choose, WARM_UP)
        for sample in range(1, NUM_SAMPLES + 1):
            codes += await send(choose, num_requests // NUM_SAMPLES)
            sent.append(sample * (num_requests // NUM_SAMPLES))
            for name, process in processes.items():
                rss_kib[name].append(process.memory_info().rss >> 10)
    assert codes.total() == num_requests
    assert codes.keys() <= BY_CODE.keys(), codes  # nobody answered without a type
    slopes = {name: slope_per_1000(sent, values) for name, values in rss_kib.items()}
    logger.info("%s: %s; KiB per 1,000 requests: %s", target, dict(codes), slopes)  # pytest --log-cli-level=INFO
    if is_long:
        assert max(slopes.values()) <= KIB_PER_1000, slopes


def at_router(channel: grpc.aio.Channel) -> Send:
    identity: Any = lambda data: data  # noqa: E731
    call: Any = channel.unary_stream(GENERATE, request_serializer=identity, response_deserializer=identity)

    async def one(data: bytes) -> str:
        stream = call(data, timeout=WAIT_S)
        try:
            async for _ in stream:
                pass
        except grpc.aio.AioRpcError as error:
            return dict(error.trailing_metadata() or ()).get(ERROR_KEY, error.code().name)
        return "it was answered"

    async def send(choose: random.Random, count: int) -> Counter[str]:
        codes = Counter[str]()
        for begin in range(0, count, BATCH):
            batch = [malformed(choose) for _ in range(min(BATCH, count - begin))]
            codes.update(await asyncio.gather(*map(one, batch)))
        return codes

    return send


def at_worker(channel: grpc.aio.Channel, name: str) -> Send:
    """One session, as a router has it: each run that it asks for is refused with RunFailed."""
    outbox: asyncio.Queue[Any] = asyncio.Queue()
    hello = worker_pb2.RouterHello(protocol_version=PROTOCOL_VERSION, router_id="malformed")
    prefills = name.startswith("prefill")
    request_type: Any = worker_pb2.PrefillSessionRequest if prefills else worker_pb2.DecodeSessionRequest
    outbox.put_nowait(request_type(hello=hello))

    async def requests() -> AsyncIterator[Any]:
        while True:
            yield await outbox.get()

    session: Any = (
        worker_pb2_grpc.PrefillWorkerStub(channel).PrefillSession(requests())
        if prefills
        else worker_pb2_grpc.DecodeWorkerStub(channel).DecodeSession(requests())
    )

    async def send(choose: random.Random, count: int) -> Counter[str]:
        codes = Counter[str]()
        for begin in range(0, count, BATCH):
            size = min(BATCH, count - begin)
            for _ in range(size):
                work = malformed_work(choose)
                if prefills:
                    outbox.put_nowait(request_type(run=worker_pb2.RunPrefill(request=work)))
                elif choose.random() < 0.5:
                    outbox.put_nowait(request_type(run=worker_pb2.RunLocal(request=work)))
                else:
                    grant = worker_pb2.RequestGrant(request=work, kv_address=choose.choice(("", "nonsense", "[::]:0")))
                    outbox.put_nowait(request_type(grant=grant))
            while size:
                async with asyncio.timeout(WAIT_S):
                    message = await session.read()
                assert message is not grpc.aio.EOF, "the worker ended the session"
                kind = message.WhichOneof("message")
                assert kind in ("hello", "status", "failed"), message  # a grant or a token: it was taken for sound
                if kind == "failed":
                    codes[message.failed.failure.code] += 1
                    size -= 1
        return codes

    return send


def malformed_work(choose: random.Random) -> worker_pb2.WorkRequest:
    """Work of which at least one thing is wrong. Ids are random: the tables of attempts see each anew."""
    work = worker_pb2.WorkRequest(
        request_id=choose.randbytes(12).hex(),
        attempt=1,
        prompt_token_ids=choose.choices(range(256), k=choose.randrange(1, 60)),
        max_tokens=4,
        timeout_s=30.0,
    )
    number = choose.choice((math.nan, -math.inf, -1e300, -1.0))
    choose.choice(
        [
            lambda: work.ClearField("request_id"),
            lambda: work.ClearField("attempt"),
            lambda: work.ClearField("prompt_token_ids"),
            lambda: work.prompt_token_ids.append(choose.choice((260, 2**31, 2**32 - 1))),
            lambda: work.prompt_token_ids.extend([1] * 10_000),
            lambda: setattr(work, "max_tokens", choose.choice((0, 2**32 - 1))),
            lambda: setattr(work, "min_tokens", 5),
            lambda: setattr(work, "timeout_s", choose.choice((math.nan, 0.0, -1.0))),
            lambda: setattr(work.sampling, "temperature", number),
            lambda: setattr(work.sampling, "top_p", number),
            lambda: work.sampling.logit_bias.update({2**20: 1.0}),
            lambda: setattr(work, "logprobs", 10_000),
            lambda: work.output_format.SetInParent(),
        ]
    )()
    return work
