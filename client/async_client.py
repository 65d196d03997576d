"""The asyncio client: the blocking one's twin, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import cached_property
from typing import TYPE_CHECKING, Self, TypeVar, Unpack, cast

import grpc
import grpc.aio

from ..core.errors import SplitserveError
from ..proto import inference_pb2 as pb
from ..proto.inference_pb2_grpc import InferenceStub, RouterAdminStub
from ..proto.rpc import CHANNEL_OPTIONS
from . import results
from .address import find_router
from .generation import (
    HEALTH_CHECK,
    HEALTH_SERVING,
    UNARY_TIMEOUT_S,
    Attempts,
    Generation,
    RetryPolicy,
    closed_error,
)
from .messages import Messages
from .request import (
    Prompt,
    RequestOptions,
    build_request,
    build_tokenize_request,
)

if TYPE_CHECKING:
    from ..proto.inference_pb2_grpc import InferenceAsyncStub

_Request = TypeVar("_Request")
_Reply = TypeVar("_Reply")


class AsyncStream:
    """One answer as it is made: iterate for chunks, then ask for `result()`. Leaving `async with` cancels it."""

    def __init__(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[pb.GenerateRequest, pb.GenerateResponse],
        generation: Generation,
    ) -> None:
        self._method = method
        self._generation = generation
        self._closed = False
        self._open()

    def _open(self) -> None:
        self._call = self._method(self._generation.request, timeout=self._generation.left_s())

    @property
    def request_id(self) -> str:
        """As logs and `cancel` know it; empty until the router's first message was read."""
        return self._generation.request_id

    def __aiter__(self) -> AsyncIterator[results.Chunk]:
        return self

    async def __anext__(self) -> results.Chunk:
        """Raises: SplitserveError: typed; whatever the request held is free then."""
        while not self._closed:
            try:
                message = await self._call.read()
                if message is grpc.aio.EOF:
                    self._generation.end()
                    raise StopAsyncIteration
                chunk = self._generation.accept(cast(pb.GenerateResponse, message))
            except grpc.RpcError as error:
                await asyncio.sleep(self._generation.retry_delay_s(error))
                if not self._closed:
                    self._open()
            except SplitserveError:
                await self.aclose()
                raise
            except asyncio.CancelledError:
                # gRPC raises it here too when another task closed this stream: that is no cancelling of our task.
                task = asyncio.current_task()
                if task is None or task.cancelling() or not self._closed:
                    raise
            else:
                if chunk is not None:
                    return chunk
        raise closed_error()

    async def result(self) -> results.GenerationResult:
        """The whole answer, reading what is left of the stream first."""
        if not self._generation.finished:
            async for _ in self:
                pass
        return self._generation.result()

    async def aclose(self) -> None:
        """Cancel the request; harmless after its end."""
        self._closed = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()


class AsyncClient:
    """A router's asyncio client, for one event loop. Close it, or use it in an `async with` block.

    Args:
        address: HOST:PORT of the router; None: SPLITSERVE_ADDRESS, else the local cluster that `splitserve up` started.
        timeout_s: deadline of a generation that names none.
        retry: what to do about errors that another attempt can help.
    """

    def __init__(
        self, address: str | None = None, *, timeout_s: float = 600.0, retry: RetryPolicy | None = None
    ) -> None:
        self.address = find_router(address)
        self._timeout_s = timeout_s
        self._retry = retry or RetryPolicy()

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        # Made on first use: it belongs to the event loop that runs then, and the constructor may run outside of one.
        return grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS)

    @cached_property
    def _inference(self) -> InferenceAsyncStub:
        return InferenceStub(self._channel)

    async def generate(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> results.GenerationResult:
        """Answer text, token ids or chat messages. Raises: SplitserveError: typed."""
        async with self.stream(prompt, **options) as stream:
            return await stream.result()

    async def chat(self, messages: Messages, **options: Unpack[RequestOptions]) -> results.GenerationResult:
        """Answer a conversation, rendered with the model's chat template. Raises: SplitserveError: typed."""
        return await self.generate(messages, **options)

    def stream(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> AsyncStream:
        """Answer chunk by chunk; no await needed. Raises: SplitserveError: typed, here or while iterating."""
        request = build_request(prompt, options)
        timeout_s = options.get("timeout_s")
        generation = Generation(request, self.address, self._timeout_s if timeout_s is None else timeout_s, self._retry)
        return AsyncStream(self._inference.Generate, generation)

    async def cancel(self, request_id: str) -> bool:
        """End a request by its id or idempotency key; False if it is unknown or already over."""
        return (await self._call(self._inference.Cancel, pb.CancelRequest(request_id=request_id))).found

    async def models(self) -> tuple[results.Model, ...]:
        """What can be asked for right now."""
        return results.models_from_proto(await self._call(self._inference.ListModels, pb.ListModelsRequest()))

    async def tokenize(self, prompt: str | Messages, *, model: str = "") -> results.Tokenization:
        """The tokens that `generate` would make of the prompt."""
        return results.tokenization_from_proto(
            await self._call(self._inference.Tokenize, build_tokenize_request(prompt, model))
        )

    async def status(self) -> results.RouterStatus:
        """Workers and requests as the router sees them."""
        status = RouterAdminStub(self._channel).GetRouterStatus
        return results.status_from_proto(await self._call(status, pb.GetRouterStatusRequest()))

    async def health(self) -> bool:
        """Whether the router can serve requests now. Raises: Unavailable: no router answers."""
        check: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(HEALTH_CHECK)
        return await self._call(check, b"") == HEALTH_SERVING

    async def _call(self, method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Reply], request: _Request) -> _Reply:
        attempts = Attempts(self.address, UNARY_TIMEOUT_S, self._retry)
        while True:
            try:
                return await method(request, timeout=attempts.left_s())
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.delay_s(error))

    async def close(self) -> None:
        """Cancel what is still open and leave the connection."""
        if "_channel" in self.__dict__:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()
