"""The asyncio client: the blocking one's twin, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Self, TypeVar, Unpack, cast, overload

import grpc
import grpc.aio

from ..core.errors import SplitserveError
from ..proto import inference_pb2 as pb
from ..proto.inference_pb2_grpc import InferenceStub, RouterAdminStub
from ..proto.rpc import CHANNEL_OPTIONS
from ..proto.tls import Tls
from . import results
from .address import find_routers
from .generation import (
    HEALTH_CHECK,
    HEALTH_SERVING,
    UNARY_TIMEOUT_S,
    Attempts,
    Generation,
    RetryPolicy,
    check_concurrency,
    closed_error,
)
from .messages import Messages, check_text
from .request import (
    Prompt,
    RequestOptions,
    build_detokenize_request,
    build_request,
    build_tokenize_request,
)
from .routers import Rotation, find_tls, key_metadata

if TYPE_CHECKING:
    from ..proto.inference_pb2_grpc import InferenceAsyncStub

_Request = TypeVar("_Request")
_Reply = TypeVar("_Reply")


class AsyncStream:
    """One answer as it is made: iterate for chunks, then ask for `result()`. Leaving `async with` cancels it."""

    def __init__(self, client: AsyncClient, generation: Generation) -> None:
        self._client = client
        self._generation = generation
        self._closed = False
        self._open()

    def _open(self) -> None:
        generation, client = self._generation, self._client
        generate = client.inference(generation.address).Generate
        self._call = generate(generation.request, timeout=generation.left_s(), metadata=client.metadata)

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
                    self._generation.answered()
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
    """The routers' asyncio client, for one event loop. Close it, or use it in an `async with` block.

    Args:
        address: HOST:PORT of the router, or several, which share the calls and stand in for each other; None:
            SPLITSERVE_ADDRESS, else the local cluster that `splitserve up` started.
        timeout_s: deadline of a generation that names none.
        retry: what to do about errors that another attempt can help.
        tls: encrypts the connection; None: SPLITSERVE_TLS_CA, _CERT and _KEY, else plain text, for loopback and trusted
            networks.
        api_key: proves who calls; None: SPLITSERVE_API_KEY, else none.
    """

    def __init__(
        self,
        address: str | Sequence[str] | None = None,
        *,
        timeout_s: float = 600.0,
        retry: RetryPolicy | None = None,
        tls: Tls | None = None,
        api_key: str | None = None,
    ) -> None:
        self.addresses = find_routers(address)
        self.metadata = key_metadata(api_key)
        self._routers = Rotation(self.addresses)
        self._timeout_s = timeout_s
        self._retry = retry or RetryPolicy()
        found = find_tls(tls)
        self._credentials = found.credentials() if found is not None else None

    @property
    def address(self) -> str:
        """Of the first router."""
        return self.addresses[0]

    @cached_property
    def _channels(self) -> dict[str, grpc.aio.Channel]:
        # Made on first use: they belong to the event loop that runs then, and the constructor may run outside of one.
        return {each: _channel(each, self._credentials) for each in self.addresses}

    @cached_property
    def _services(self) -> dict[str, InferenceAsyncStub]:
        return {each: InferenceStub(channel) for each, channel in self._channels.items()}

    def inference(self, address: str) -> InferenceAsyncStub:
        """One router's service."""
        return self._services[address]

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
        given_s = options.get("timeout_s")
        timeout_s = self._timeout_s if given_s is None else given_s
        generation = Generation(request, self._routers, timeout_s, self._retry)
        return AsyncStream(self, generation)

    @overload
    async def batch(
        self,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = ...,
        return_errors: Literal[False] = ...,
        **options: Unpack[RequestOptions],
    ) -> list[results.GenerationResult]: ...
    @overload
    async def batch(
        self,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = ...,
        return_errors: Literal[True],
        **options: Unpack[RequestOptions],
    ) -> list[results.GenerationResult | SplitserveError]: ...
    async def batch(
        self,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = 16,
        return_errors: bool = False,
        **options: Unpack[RequestOptions],
    ) -> Sequence[results.GenerationResult | SplitserveError]:
        """Answer many prompts, `concurrency` at a time; results come in the order of the prompts.

        Args: return_errors: put each error in its prompt's place, instead of raising the first and cancelling the rest.
        Raises: SplitserveError: typed.
        """
        room = asyncio.Semaphore(check_concurrency(concurrency))

        async def answer(prompt: Prompt) -> results.GenerationResult | SplitserveError:
            async with room:
                try:
                    return await self.generate(prompt, **options)
                except SplitserveError as error:
                    if return_errors:
                        return error
                    raise

        tasks = [asyncio.create_task(answer(prompt)) for prompt in prompts]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def cancel(self, request_id: str) -> bool:
        """End a request by its id or idempotency key, whichever router has it; False if it is unknown or over."""
        request = pb.CancelRequest(request_id=check_text(request_id, "request_id"))
        calls = (self._call(lambda each: self.inference(each).Cancel, request, at) for at in self.addresses)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        if any(not isinstance(answer, BaseException) and answer.found for answer in answers):
            return True
        for answer in answers:  # whoever did not answer may have had it
            if isinstance(answer, BaseException):
                raise answer
        return False

    async def models(self) -> tuple[results.Model, ...]:
        """What can be asked for right now."""
        made = await self._call(lambda each: self.inference(each).ListModels, pb.ListModelsRequest())
        return results.models_from_proto(made)

    async def tokenize(self, prompt: str | Messages, *, model: str = "") -> results.Tokenization:
        """The tokens that `generate` would make of the prompt."""
        request = build_tokenize_request(prompt, model)
        return results.tokenization_from_proto(await self._call(lambda each: self.inference(each).Tokenize, request))

    async def detokenize(self, token_ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        """The text that token ids stand for."""
        request = build_detokenize_request(token_ids, keep_special_tokens=keep_special_tokens)
        return (await self._call(lambda each: self.inference(each).Detokenize, request)).text

    async def status(self) -> results.RouterStatus:
        """Workers and requests as the first router sees them."""
        admin = RouterAdminStub(self._channels[self.address])
        status = await self._call(lambda _: admin.GetRouterStatus, pb.GetRouterStatusRequest(), self.address)
        return results.status_from_proto(status)

    async def health(self) -> bool:
        """Whether a router can serve requests now. Raises: Unavailable: no router answers."""

        def check(address: str) -> grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]:
            return self._channels[address].unary_unary(HEALTH_CHECK)

        return await self._call(check, b"") == HEALTH_SERVING

    async def _call(
        self,
        method_of: Callable[[str], grpc.aio.UnaryUnaryMultiCallable[_Request, _Reply]],
        request: _Request,
        address: str | None = None,
    ) -> _Reply:
        """Ask one router: the one named, or whichever can answer."""
        routers = self._routers if address is None else Rotation([address])
        attempts = Attempts(routers, UNARY_TIMEOUT_S, self._retry)
        while True:
            try:
                method = method_of(attempts.address)
                reply = await method(request, timeout=attempts.left_s(), metadata=self.metadata)
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.delay_s(error))
            else:
                attempts.answered()
                return reply

    async def close(self) -> None:
        """Cancel what is still open and leave the connection."""
        if "_channels" in self.__dict__:
            await asyncio.gather(*(channel.close() for channel in self._channels.values()))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()


def _channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
