"""The blocking client; safe to share between threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Self, TypeVar, Unpack, overload

import grpc

from ..core.errors import SplitserveError
from ..proto import inference_pb2 as pb
from ..proto.inference_pb2_grpc import InferenceStub, RouterAdminStub
from ..proto.tls import Tls, open_blocking_channel
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

_Request = TypeVar("_Request")
_Reply = TypeVar("_Reply")


class Stream:
    """One answer as it is made: iterate for chunks, then ask for `result()`. Leaving the `with` block cancels it."""

    def __init__(self, client: Client, generation: Generation) -> None:
        self._client = client
        self._generation = generation
        self._closed = threading.Event()
        self._open()

    def _open(self) -> None:
        generation, client = self._generation, self._client
        generate = client.inference(generation.address).Generate
        self._call = generate(generation.request, timeout=generation.left_s(), metadata=client.metadata)

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
                self._generation.answered()
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
    """The routers' blocking client. Close it, or use it in a `with` block.

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
        self._channels = {each: open_blocking_channel(each, find_tls(tls)) for each in self.addresses}
        self._services = {each: InferenceStub(channel) for each, channel in self._channels.items()}

    @property
    def address(self) -> str:
        """Of the first router."""
        return self.addresses[0]

    def inference(self, address: str) -> InferenceStub:
        """One router's service."""
        return self._services[address]

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
        given_s = options.get("timeout_s")
        timeout_s = self._timeout_s if given_s is None else given_s
        generation = Generation(request, self._routers, timeout_s, self._retry)
        return Stream(self, generation)

    @overload
    def batch(
        self,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = ...,
        return_errors: Literal[False] = ...,
        **options: Unpack[RequestOptions],
    ) -> list[results.GenerationResult]: ...
    @overload
    def batch(
        self,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = ...,
        return_errors: Literal[True],
        **options: Unpack[RequestOptions],
    ) -> list[results.GenerationResult | SplitserveError]: ...
    def batch(
        self,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = 16,
        return_errors: bool = False,
        **options: Unpack[RequestOptions],
    ) -> Sequence[results.GenerationResult | SplitserveError]:
        """Answer many prompts, `concurrency` at a time; results come in the order of the prompts.

        Args: return_errors: put each error in its prompt's place, instead of raising the first and dropping the rest.
        Raises: SplitserveError: typed.
        """

        def answer(prompt: Prompt) -> results.GenerationResult | SplitserveError:
            try:
                return self.generate(prompt, **options)
            except SplitserveError as error:
                if return_errors:
                    return error
                raise

        with ThreadPoolExecutor(max_workers=check_concurrency(concurrency)) as pool:
            try:
                return list(pool.map(answer, prompts))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def cancel(self, request_id: str) -> bool:
        """End a request by its id or idempotency key, whichever router has it; False if it is unknown or over."""
        request = pb.CancelRequest(request_id=check_text(request_id, "request_id"))
        found, failure = False, None
        for at in self.addresses:  # the others are asked whatever becomes of one: it may be gone, and the request not
            try:
                found |= self._call(lambda each: self.inference(each).Cancel, request, at).found
            except SplitserveError as error:
                failure = error
        if failure is not None and not found:
            raise failure
        return found

    def models(self) -> tuple[results.Model, ...]:
        """What can be asked for right now."""
        made = self._call(lambda each: self.inference(each).ListModels, pb.ListModelsRequest())
        return results.models_from_proto(made)

    def tokenize(self, prompt: str | Messages, *, model: str = "") -> results.Tokenization:
        """The tokens that `generate` would make of the prompt."""
        request = build_tokenize_request(prompt, model)
        return results.tokenization_from_proto(self._call(lambda each: self.inference(each).Tokenize, request))

    def detokenize(self, token_ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        """The text that token ids stand for."""
        request = build_detokenize_request(token_ids, keep_special_tokens=keep_special_tokens)
        return self._call(lambda each: self.inference(each).Detokenize, request).text

    def status(self) -> results.RouterStatus:
        """Workers and requests as the first router sees them."""
        admin = RouterAdminStub(self._channels[self.address])
        status = self._call(lambda _: admin.GetRouterStatus, pb.GetRouterStatusRequest(), self.address)
        return results.status_from_proto(status)

    def health(self) -> bool:
        """Whether a router can serve requests now. Raises: Unavailable: no router answers."""

        def check(address: str) -> grpc.UnaryUnaryMultiCallable[bytes, bytes]:
            return self._channels[address].unary_unary(HEALTH_CHECK)

        return self._call(check, b"") == HEALTH_SERVING

    def _call(
        self,
        method_of: Callable[[str], grpc.UnaryUnaryMultiCallable[_Request, _Reply]],
        request: _Request,
        address: str | None = None,
    ) -> _Reply:
        """Ask one router: the one named, or whichever can answer."""
        routers = self._routers if address is None else Rotation([address])
        attempts = Attempts(routers, UNARY_TIMEOUT_S, self._retry)
        while True:
            try:
                method = method_of(attempts.address)
                reply = method(request, timeout=attempts.left_s(), metadata=self.metadata)
            except grpc.RpcError as error:
                time.sleep(attempts.delay_s(error))
            else:
                attempts.answered()
                return reply

    def close(self) -> None:
        """Cancel what is still open and leave the connection."""
        for channel in self._channels.values():
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
