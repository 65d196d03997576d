"""A router before scripted workers: real gRPC servers that speak the session protocol and say what a test tells."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio
from splitserve.client import AsyncClient, GenerationResult, RetryPolicy
from splitserve.engine.testing import make_tiny_model
from splitserve.proto import inference_pb2, kv_transfer_pb2, worker_pb2, worker_pb2_grpc
from splitserve.proto.convert import PROTOCOL_VERSION
from splitserve.router.server import Router, RouterOptions
from splitserve.router.session import WorkerLink

WAIT_S = 60.0
STATUS_S = 0.2
LENGTH = inference_pb2.FINISH_REASON_LENGTH

PROMPT = [10, 20, 30]
ANSWER = list(range(100, 120))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory, of which the router reads the tokenizer: token ids below 256 are bytes."""
    return make_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")


class ScriptedWorker:
    """One worker: what the router sends waits in `inbox`, and nothing is answered unless the test says it."""

    def __init__(self, role: str, model: str, **changes: Any) -> None:
        self.role = role
        self.info = worker_pb2.WorkerInfo(
            **{
                "protocol_version": PROTOCOL_VERSION,
                "worker_id": role,
                "boot_id": secrets.token_hex(8),
                "role": worker_pb2.Role.Value(f"ROLE_{role.upper()}"),
                "model": model,
                "geometry_digest": "g",
                "max_model_len": 4096,
                "vocab_size": 260,
                "block_size": 16,
                "prefix_model_id": "m",
                "kv_dtype": "float32",
                "late_grants": True,
                **changes,
            }
        )
        self.status = worker_pb2.WorkerStatus(num_blocks=1000, num_free_blocks=1000)
        self.inbox: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()  # work
        self.cancels: asyncio.Queue[worker_pb2.CancelRun] = asyncio.Queue()
        self.silent = False  # hangs: keeps the session open and says nothing
        self.says_hello = True
        self.address = ""
        self._response: Any = worker_pb2.PrefillSessionResponse
        if role != "prefill":
            self._response = worker_pb2.DecodeSessionResponse
        self._outbox: asyncio.Queue[Any] = asyncio.Queue()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self._server = server = grpc.aio.server()
        if self.role == "prefill":
            worker_pb2_grpc.add_PrefillWorkerServicer_to_server(self, server)
        else:
            worker_pb2_grpc.add_DecodeWorkerServicer_to_server(self, server)
        self.address = f"127.0.0.1:{server.add_insecure_port(self.address or '127.0.0.1:0')}"
        self.info.kv_address = self.address
        await server.start()

    async def die(self) -> None:
        """Every session ends at once."""
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    async def PrefillSession(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        hello = await anext(requests)
        assert hello.WhichOneof("message") == "hello"
        self._outbox = outbox = asyncio.Queue()
        reader = asyncio.create_task(self._read(requests))
        try:
            if self.says_hello:
                yield self._response(hello=self.info)
            while True:
                try:
                    async with asyncio.timeout(STATUS_S):
                        message = await outbox.get()
                except TimeoutError:
                    message = None if self.silent else self._response(status=self.status)
                if message is not None:
                    yield message
        finally:
            reader.cancel()

    DecodeSession = PrefillSession

    async def _read(self, requests: AsyncIterator[Any]) -> None:
        async for message in requests:
            kind = message.WhichOneof("message")
            body = getattr(message, kind)
            if kind == "cancel":
                self.cancels.put_nowait(body)
            else:
                self.inbox.put_nowait((kind, body))

    async def receive(self, kind: str) -> Any:
        """The router's next piece of work, which must be of this kind."""
        async with asyncio.timeout(WAIT_S):
            got, body = await self.inbox.get()
        assert got == kind, (got, body)
        return body

    async def receive_cancel(self) -> worker_pb2.CancelRun:
        async with asyncio.timeout(WAIT_S):
            return await self.cancels.get()

    def say(self, **message: Any) -> None:
        self._outbox.put_nowait(self._response(**message))

    def say_status(self) -> None:
        self.say(status=self.status)

    def fail(self, work: worker_pb2.WorkRequest, code: str, message: str = "as the test says") -> None:
        failure = worker_pb2.Failure(code=code, message=message)
        self.say(failed=worker_pb2.RunFailed(request_id=work.request_id, attempt=work.attempt, failure=failure))

    # Of a decode worker.

    def grant(self, work: worker_pb2.WorkRequest) -> None:
        self.say(grant=kv_transfer_pb2.Grant(grant_id="a" * 32, request_id=work.request_id, attempt=work.attempt))

    def transfer_done(self, work: worker_pb2.WorkRequest, token: int) -> None:
        self.say(
            transfer_done=worker_pb2.TransferDone(
                request_id=work.request_id,
                attempt=work.attempt,
                index=len(work.output_token_ids),
                first_token_id=token,
                transport=kv_transfer_pb2.TRANSPORT_GRPC,
                num_bytes=64,
            )
        )

    def tokens(
        self, work: worker_pb2.WorkRequest, index: int, token_ids: list[int], finish: int = 0, attempt: int = 0
    ) -> None:
        entry = worker_pb2.SequenceTokens(
            request_id=work.request_id,
            attempt=attempt or work.attempt,
            index=index,
            token_ids=token_ids,
            finish_reason=finish,
        )
        self.say(tokens=worker_pb2.StepTokens(sequences=[entry]))

    # Of a prefill worker.

    def first_token(
        self, work: worker_pb2.WorkRequest, token: int, finish: int = 0, *, ungranted: bool = False
    ) -> None:
        self.say(
            first_token=worker_pb2.FirstToken(
                request_id=work.request_id,
                attempt=work.attempt,
                index=len(work.output_token_ids),
                token_id=token,
                finish_reason=finish,
                ungranted=ungranted,
            )
        )


@dataclass
class Scene:
    """A router, its scripted workers, and a client that does not retry."""

    router: Router
    prefills: list[ScriptedWorker]
    decodes: list[ScriptedWorker]
    client: AsyncClient

    @property
    def prefill(self) -> ScriptedWorker:
        return self.prefills[0]

    @property
    def decode(self) -> ScriptedWorker:
        return self.decodes[0]

    @property
    def num_stale(self) -> float:
        return self.router.metrics.stale_messages._value.get()

    def at(self, address: str) -> ScriptedWorker:
        return next(worker for worker in self.prefills + self.decodes if worker.address == address)

    async def placed(self) -> ScriptedWorker:
        """The decode worker that is asked next."""
        async with asyncio.timeout(WAIT_S):
            while True:
                for worker in self.decodes:
                    if not worker.inbox.empty():
                        return worker
                await asyncio.sleep(0.002)

    async def state(self, address: str) -> tuple[str, str]:
        """How the router sees a worker: its state, and why."""
        worker = next(row for row in (await self.client.status()).workers if row.address == address)
        return worker.state, worker.reason

    async def becomes(self, address: str, state: str) -> str:
        """Wait for a state; returns its reason."""
        async with asyncio.timeout(WAIT_S):
            while (seen := await self.state(address))[0] != state:
                await asyncio.sleep(0.01)
        return seen[1]

    async def heard(self, worker: ScriptedWorker) -> WorkerLink:
        """Wait until the router knows the worker's status; returns its link."""
        link = next(link for link in self.router.pool if link.address == worker.address)
        async with asyncio.timeout(WAIT_S):
            while link.status != worker.status:
                await asyncio.sleep(0.002)
        return link

    def check_nothing_left(self) -> None:
        dispatcher = self.router.dispatcher
        assert dispatcher.num_live == dispatcher.waiting.num_queued == 0
        assert not any(link.runs for link in self.router.pool)


StartScene = Callable[..., Awaitable[Scene]]


@pytest_asyncio.fixture
async def start_scene(tiny: Path) -> AsyncIterator[StartScene]:
    """start_scene(prefill=1, decode=1, colocated=0, workers=[...], **router options)."""
    async with AsyncExitStack() as stack:

        async def start(
            *,
            prefill: int = 1,
            decode: int = 1,
            colocated: int = 0,
            ready: bool = True,
            decode_changes: dict[str, Any] | None = None,
            **options: Any,
        ) -> Scene:
            model = str(tiny)
            prefills = [ScriptedWorker("prefill", model) for _ in range(prefill)]
            decodes = [ScriptedWorker("decode", model, **(decode_changes or {})) for _ in range(decode)]
            decodes += [ScriptedWorker("colocated", model) for _ in range(colocated)]
            for worker in prefills + decodes:
                stack.push_async_callback(worker.die)
                await worker.start()
            router = Router(
                RouterOptions(
                    model=model,
                    prefill=tuple(worker.address for worker in prefills),
                    decode=tuple(worker.address for worker in decodes),
                    port=0,
                    **options,
                )
            )
            stack.push_async_callback(router.stop)
            address = (await router.start()).address
            client = await stack.enter_async_context(AsyncClient(address, retry=RetryPolicy(max_attempts=1)))
            scene = Scene(router, prefills, decodes, client)
            if ready:
                for worker in prefills + decodes:
                    await scene.becomes(worker.address, "ready")
            return scene

        yield start


def ask(scene: Scene, **options: object) -> asyncio.Task[GenerationResult]:
    """One request for all of ANSWER."""
    return asyncio.create_task(scene.client.generate(PROMPT, **{"max_tokens": len(ANSWER), **options}))


async def granted(scene: Scene, decode: ScriptedWorker | None = None) -> tuple[ScriptedWorker, worker_pb2.WorkRequest]:
    """The decode worker grants what it is asked for; returns the prefill worker and the work it is given."""
    request = await (decode or scene.decode).receive("grant")
    (decode or scene.decode).grant(request.request)
    async with asyncio.timeout(WAIT_S):
        while all(worker.inbox.empty() for worker in scene.prefills):
            await asyncio.sleep(0.002)
    prefill = next(worker for worker in scene.prefills if not worker.inbox.empty())
    run = await prefill.receive("run")
    if not run.HasField("grant"):  # it did not wait for the grant, which follows
        await prefill.receive("grant")
    assert run.request.prompt_token_ids, "a run without its prompt"
    assert run.request.prompt_token_ids == request.request.prompt_token_ids
    return prefill, run.request


async def end_of(task: asyncio.Task[GenerationResult]) -> GenerationResult:
    async with asyncio.timeout(WAIT_S):
        return await task


def speak(decode: ScriptedWorker, work: worker_pb2.WorkRequest, start: int, end: int) -> None:
    decode.tokens(work, start, ANSWER[start:end], finish=LENGTH if end == len(ANSWER) else 0)
