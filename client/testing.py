"""A real gRPC router whose answers a script writes, for tests of whatever uses the SDK. Needs splitserve[serve]."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any, Self

import grpc.aio

from ..core.errors import SplitserveError
from ..proto import inference_pb2 as pb
from ..proto.inference_pb2_grpc import (
    InferenceServicer,
    RouterAdminServicer,
    add_InferenceServicer_to_server,
    add_RouterAdminServicer_to_server,
)
from ..proto.rpc import abort
from ..proto.server import RpcServer

Script = Callable[[pb.GenerateRequest], AsyncIterator[pb.GenerateResponse]]

VOCAB_SIZE = 1_000


async def count_up(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
    """The default script: tokens 0, 1, 2, ... up to max_tokens (unset: 4), their numbers as text."""
    num_prompt_tokens = len(request.token_ids.ids) or len(request.text.split()) or len(request.messages.messages)
    num_tokens = request.max_tokens or 4
    yield started(num_prompt_tokens=num_prompt_tokens, seed=request.sampling.seed or 7)
    for index in range(len(request.received_token_ids), num_tokens):
        yield token(index)
    yield finished(num_prompt_tokens=num_prompt_tokens, num_output_tokens=num_tokens)


def started(request_id: str = "r-1", num_prompt_tokens: int = 1, seed: int = 7) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        started=pb.Started(request_id=request_id, model="tiny", num_prompt_tokens=num_prompt_tokens, seed=seed)
    )


def token(index: int) -> pb.GenerateResponse:
    return pb.GenerateResponse(tokens=pb.Tokens(index=index, token_ids=[index], text=f"{index} "))


def finished(
    num_prompt_tokens: int = 1, num_output_tokens: int = 4, timing: pb.RequestTiming | None = None
) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        finished=pb.Finished(
            reason=pb.FINISH_REASON_LENGTH,
            usage=pb.Usage(num_prompt_tokens=num_prompt_tokens, num_output_tokens=num_output_tokens),
            timing=timing or pb.RequestTiming(transport="none", attempts=1),
        )
    )


class ScriptedRouter(InferenceServicer, RouterAdminServicer):
    """Serves in a thread of its own from `with` to the end of the block; a script may raise typed errors.

    Attributes:
        requests: every Generate request, in order of arrival.
        freed: counted up once for each Generate call that ended, however it ended: `freed.acquire(timeout=...)`.
    """

    def __init__(self, script: Script = count_up, port: int = 0) -> None:
        self.requests: list[pb.GenerateRequest] = []
        self.cancelled_ids: list[str] = []
        self.freed = threading.Semaphore(0)
        self._script = script
        self._port = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="scripted-router", daemon=True)

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        try:
            async for message in self._script(request):
                yield message
        except SplitserveError as error:
            await abort(context, error)
        finally:
            self.freed.release()

    async def Cancel(self, request: pb.CancelRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.CancelResponse:
        self.cancelled_ids.append(request.request_id)
        return pb.CancelResponse(found=request.request_id == "r-1")

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[pb.Model(name="tiny", max_model_len=256, vocab_size=VOCAB_SIZE)])

    async def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.TokenizeResponse:
        words = request.text.split() or [turn.content for turn in request.messages.messages]
        return pb.TokenizeResponse(token_ids=range(len(words)), tokens=words)

    async def SetWorkers(
        self, request: pb.SetWorkersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.SetWorkersResponse:
        return pb.SetWorkersResponse()

    async def GetRouterStatus(
        self, request: pb.GetRouterStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetRouterStatusResponse:
        worker = pb.WorkerView(address="127.0.0.1:1", role="decode", state="ready", num_blocks=10)
        return pb.GetRouterStatusResponse(workers=[worker], num_finished=len(self.requests))

    @property
    def address(self) -> str:
        return self._server.address

    def set_serving(self, serving: bool) -> None:
        """What health checks see."""
        self._run(self._server.set_serving(serving)).result(5)

    def stop(self) -> None:
        """Die at once: open calls fail with UNAVAILABLE."""
        self._run(self._server.stop(0)).result(5)

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._start()).result(5)
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        self._server = RpcServer("127.0.0.1", self._port, ["splitserve.v1.Inference", "splitserve.v1.RouterAdmin"])
        add_InferenceServicer_to_server(self, self._server.server)
        add_RouterAdminServicer_to_server(self, self._server.server)
        await self._server.start()

    def _run(self, coroutine: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
