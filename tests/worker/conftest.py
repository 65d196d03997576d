"""Real prefill and decode workers in this process, driven over gRPC as a router would."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio
from splitserve.core.request import Request
from splitserve.decode_worker.server import DecodeServer
from splitserve.engine.options import EngineOptions
from splitserve.engine.outputs import Usage
from splitserve.engine.testing import make_tiny_model
from splitserve.prefill_worker.server import PrefillServer
from splitserve.proto import kv_transfer_pb2, worker_pb2, worker_pb2_grpc
from splitserve.proto.convert import PROTOCOL_VERSION, request_to_proto
from splitserve.proto.rpc import CHANNEL_OPTIONS
from splitserve.scheduling.step_plan import StepPlan
from splitserve.worker.options import WorkerOptions

WAIT_S = 60.0


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    make_tiny_model("llama", path)
    return path


class End:
    """The router's end of one session."""

    def __init__(self, channel: grpc.aio.Channel, call: Any, request_type: type) -> None:
        self.channel = channel
        self.call = call
        self._request_type = request_type

    async def send(self, **message: Any) -> None:
        await self.call.write(self._request_type(**message))

    async def next(self, *kinds: str) -> Any:
        """The next message of one of these kinds; anything else but a status is a failure of the test."""
        async with asyncio.timeout(WAIT_S):
            while (message := await self.call.read()) is not grpc.aio.EOF:
                kind = message.WhichOneof("message")
                if kind in kinds:
                    return getattr(message, kind)
                assert kind == "status", f"{kind} came, wanted {kinds}: {message}"
        raise AssertionError(f"the session ended, wanted {kinds}")


@dataclass
class Pair:
    """One prefill and one decode worker, and a router's sessions on them."""

    prefill: PrefillServer
    decode: DecodeServer
    prefill_end: End
    decode_end: End
    prefill_info: worker_pb2.WorkerInfo
    prefill_metrics: str  # host:port

    def usages(self) -> tuple[Usage, Usage]:
        return self.prefill.worker.host.engine.usage(), self.decode.worker.host.engine.usage()

    async def ask_grant(self, request: Request, **changes: Any) -> None:
        place = {
            "kv_address": self.prefill_info.kv_address,
            "prefill_boot_id": self.prefill_info.boot_id,
            "prefill_kv_dtype": self.prefill_info.kv_dtype,
            **changes,
        }
        work = request_to_proto(request, request.timeout_s)
        await self.decode_end.send(grant=worker_pb2.RequestGrant(request=work, **place))

    async def grant(self, request: Request, **changes: str) -> kv_transfer_pb2.Grant:
        await self.ask_grant(request, **changes)
        return await self.decode_end.next("grant")

    async def prefill_run(self, request: Request, grant: kv_transfer_pb2.Grant | None = None) -> None:
        run = worker_pb2.RunPrefill(request=request_to_proto(request, request.timeout_s), grant=grant)
        await self.prefill_end.send(run=run)

    async def serve(self, request: Request) -> list[int]:
        """The whole path of one request: its tokens, the first from the prefill worker."""
        await self.prefill_run(request, await self.grant(request))
        first = await self.prefill_end.next("first_token")
        done = await self.decode_end.next("transfer_done")
        assert (done.first_token_id, done.index) == (first.token_id, first.index)
        return [first.token_id, *await self.rest(first.index + 1)]

    async def rest(self, index: int) -> list[int]:
        """Tokens of the only running sequence until it finishes; they must come in order from `index`."""
        tokens: list[int] = []
        while True:
            (sequence,) = (await self.decode_end.next("tokens")).sequences
            assert sequence.index == index + len(tokens)
            tokens += sequence.token_ids
            if sequence.finish_reason:
                return tokens

    async def idle(self) -> None:
        """Wait until neither worker holds a block for anybody; fail if it never happens."""
        async with asyncio.timeout(WAIT_S):
            for host in (self.prefill.worker.host, self.decode.worker.host):
                await until(lambda usage: usage.blocks_live + usage.blocks_granted + usage.num_waiting == 0, host)
        for host in (self.prefill.worker.host, self.decode.worker.host):
            assert host.engine.num_orphaned_blocks() == 0
        for usage in self.usages():
            assert usage.blocks_free + usage.blocks_cached == usage.blocks_total
            assert usage.num_running + usage.num_held + usage.num_reserved == 0


async def until(condition: Callable[[Usage], bool], host: Any) -> None:
    """Poll an engine's usage: the one thing here that has no event to wait for."""
    while not condition(host.engine.usage()):
        await asyncio.sleep(0.002)


@contextmanager
def held_step(server: PrefillServer | DecodeServer) -> Iterator[None]:
    """The device hangs: the next step does not end before the block does."""
    runner, go_on = server.worker.host.engine._runner, threading.Event()
    launch = runner.launch

    def hang(plan: StepPlan) -> None:
        go_on.wait()
        launch(plan)

    runner.launch = hang
    try:
        yield
    finally:
        runner.launch = launch
        go_on.set()


OpenPair = Callable[..., Awaitable[Pair]]


@pytest_asyncio.fixture
async def open_pair(model_dir: Path) -> AsyncIterator[OpenPair]:
    async with AsyncExitStack() as stack:

        async def open_(
            *,
            decode_model: Path | None = None,
            num_decode_blocks: int = 64,
            decode_engine: dict[str, Any] | None = None,
            **changes: Any,
        ) -> Pair:
            engine = EngineOptions(
                model=str(model_dir),
                dtype="float32",
                num_threads=1,
                num_kv_blocks=64,
                max_step_tokens=32,
                self_check=False,
                shared_pool=True,
            )
            prefill = PrefillServer(WorkerOptions(engine=engine, role="prefill", **changes))
            stack.push_async_callback(prefill.worker.stop)
            other = replace(engine, model=str(decode_model or model_dir), num_kv_blocks=num_decode_blocks)
            other = replace(other, **decode_engine or {})
            decode = DecodeServer(WorkerOptions(engine=other, role="decode", **changes))
            stack.push_async_callback(decode.worker.stop)
            prefill_end, prefill_info, metrics = await session(stack, prefill)
            decode_end, *_ = await session(stack, decode)
            return Pair(prefill, decode, prefill_end, decode_end, prefill_info, metrics)

        yield open_


@pytest_asyncio.fixture
async def pair(open_pair: OpenPair) -> Pair:
    return await open_pair()


async def session(
    stack: AsyncExitStack, server: PrefillServer | DecodeServer
) -> tuple[End, worker_pb2.WorkerInfo, str]:
    ready = await server.worker.host.start()
    end = await connect(stack, server)
    await end.send(hello=worker_pb2.RouterHello(protocol_version=PROTOCOL_VERSION, router_id="test"))
    return end, await end.next("hello"), ready.metrics_address


async def connect(stack: AsyncExitStack, server: PrefillServer | DecodeServer) -> End:
    channel = grpc.aio.insecure_channel(server.worker.host.rpc.address, options=CHANNEL_OPTIONS)
    await stack.enter_async_context(channel)
    if isinstance(server, PrefillServer):
        prefill = worker_pb2_grpc.PrefillWorkerStub(channel).PrefillSession()
        return End(channel, prefill, worker_pb2.PrefillSessionRequest)
    return End(channel, worker_pb2_grpc.DecodeWorkerStub(channel).DecodeSession(), worker_pb2.DecodeSessionRequest)


@pytest_asyncio.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as found:
        yield found
