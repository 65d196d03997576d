"""The blocking client; safe to share between threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Self, TypeVar, Unpack

import grpc

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

_Request = TypeVar("_Request")
_Reply = TypeVar("_Reply")


class Stream:
    """One answer as it is made: iterate for chunks, then ask for `result()`. Leaving the `with` block cancels it."""

    def __init__(
        self, method: grpc.UnaryStreamMultiCallable[pb.GenerateRequest, pb.GenerateResponse], generation: Generation
    ) -> None:
        self._method = method
        self._generation = generation
        self._closed = threading.Event()
        self._open()

    def _open(self) -> None:
        self._call = self._method(self._generation.request, timeout=self._generation.left_s())

    @property
    def request_id(self) -> str:
        """As logs and `cancel` know it; empty until the router's first message was read."""
        return self._generation.request_id

    def __iter__(self) -> Iterator[results.Chunk]:
        return self

    def __next__(self) -> results.Chunk:
        """Raises: SplitserveError: typed; whatever the request held is free then."""
        while not self._closed.is_set():
            try:
                chunk = self._generation.accept(next(self._call))
            except StopIteration:
                self._generation.end()
                raise
            except grpc.RpcError as error:
                if self._closed.is_set() or self._closed.wait(self._generation.retry_delay_s(error)):
                    break
                self._open()
            except SplitserveError:
                self.close()
                raise
            else:
                if chunk is not None:
                    return chunk
        raise closed_error()

    def result(self) -> results.GenerationResult:
        """The whole answer, reading what is left of the stream first."""
        if not self._generation.finished:
            for _ in self:
                pass
        return self._generation.result()

    def close(self) -> None:
        """Cancel the request; harmless after its end."""
        self._closed.set()
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Client:
    """A router's blocking client. Close it, or use it in a `with` block.

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
        self._channel = grpc.insecure_channel(self.address, options=CHANNEL_OPTIONS)
        self._inference = InferenceStub(self._channel)
        self._admin = RouterAdminStub(self._channel)

    def generate(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> results.GenerationResult:
        """Answer text, token ids or chat messages. Raises: SplitserveError: typed."""
        with self.stream(prompt, **options) as stream:
            return stream.result()

    def chat(self, messages: Messages, **options: Unpack[RequestOptions]) -> results.GenerationResult:
        """Answer a conversation, rendered with the model's chat template. Raises: SplitserveError: typed."""
        return self.generate(messages, **options)

    def stream(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Stream:
        """Answer chunk by chunk. Raises: SplitserveError: typed, here or while iterating."""
        request = build_request(prompt, options)
        timeout_s = options.get("timeout_s")
        generation = Generation(request, self.address, self._timeout_s if timeout_s is None else timeout_s, self._retry)
        return Stream(self._inference.Generate, generation)

    def cancel(self, request_id: str) -> bool:
        """End a request by its id or idempotency key; False if it is unknown or already over."""
        return self._call(self._inference.Cancel, pb.CancelRequest(request_id=request_id)).found

    def models(self) -> tuple[results.Model, ...]:
        """What can be asked for right now."""
        return results.models_from_proto(self._call(self._inference.ListModels, pb.ListModelsRequest()))

    def tokenize(self, prompt: str | Messages, *, model: str = "") -> results.Tokenization:
        """The tokens that `generate` would make of the prompt."""
        return results.tokenization_from_proto(
            self._call(self._inference.Tokenize, build_tokenize_request(prompt, model))
        )

    def status(self) -> results.RouterStatus:
        """Workers and requests as the router sees them."""
        return results.status_from_proto(self._call(self._admin.GetRouterStatus, pb.GetRouterStatusRequest()))

    def health(self) -> bool:
        """Whether the router can serve requests now. Raises: Unavailable: no router answers."""
        check: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(HEALTH_CHECK)
        return self._call(check, b"") == HEALTH_SERVING

    def _call(self, method: grpc.UnaryUnaryMultiCallable[_Request, _Reply], request: _Request) -> _Reply:
        attempts = Attempts(self.address, UNARY_TIMEOUT_S, self._retry)
        while True:
            try:
                return method(request, timeout=attempts.left_s())
            except grpc.RpcError as error:
                time.sleep(attempts.delay_s(error))

    def close(self) -> None:
        """Cancel what is still open and leave the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
