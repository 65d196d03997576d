"""One Generate call without its I/O: its deadline and retries, and its stream folded into chunks and a result."""

from __future__ import annotations

import math
import random
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import grpc

from ..core.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    SplitserveError,
    Unavailable,
)
from ..core.logprobs import TokenLogprob
from ..proto import inference_pb2 as pb
from ..proto.convert import logprob_from_proto, reason_from_proto
from ..proto.rpc import ERROR_KEY, from_rpc_error
from .results import Chunk, GenerationResult, timing_from_proto, usage_from_proto
from .routers import Rotation

# gRPC's health protocol as bytes: its Python package comes with [serve] only, and these are the two messages we need.
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
HEALTH_SERVING = b"\x08\x01"

UNARY_TIMEOUT_S = 10.0
_LONGEST_S = 1e8  # three years; gRPC takes a deadline that 64 bits of nanoseconds do not hold for one that has passed


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and how patiently a call that a retry can help is tried.

    A stream that breaks after its first token goes on after the tokens that are there; attempts that bring new ones do
    not count.
    """

    max_attempts: int = 3
    initial_backoff_s: float = 0.1
    max_backoff_s: float = 5.0

    def delay_s(self, attempt: int, error: SplitserveError) -> float | None:
        """Seconds to wait after failed attempt number `attempt` (from 1); None: give up.

        Jitter spreads clients that failed together; a server's retry_after_s is never cut short.
        """
        if not error.retryable or attempt >= self.max_attempts:
            return None
        backoff_s = min(self.max_backoff_s, self.initial_backoff_s * 2.0 ** (attempt - 1))
        return (error.retry_after_s or 0.0) + backoff_s * random.uniform(0.5, 1.0)


class Attempts:
    """The deadline and the attempts of one call, unary or streaming; `address` is the router to ask."""

    def __init__(self, routers: Rotation, timeout_s: float, retry: RetryPolicy) -> None:
        """Raises: DeadlineExceeded, InvalidRequest: there is no time left, or it is not a number."""
        if math.isnan(timeout_s):
            raise InvalidRequest("timeout_s is NaN; it must be a number of seconds", field="timeout_s")
        if timeout_s <= 0:
            raise DeadlineExceeded(
                f"timeout_s is {timeout_s:g}: the deadline passed before the call", field="timeout_s"
            )
        self.sent_s = time.monotonic()
        self.address = routers.pick()
        self._routers = routers
        self._timeout_s = timeout_s
        self._deadline_s = self.sent_s + timeout_s
        self._retry = retry
        self._attempt = 1

    def left_s(self) -> float:
        """Seconds until the deadline, as gRPC can count them."""
        return min(self._deadline_s - time.monotonic(), _LONGEST_S)

    def delay_s(self, error: grpc.RpcError) -> float:
        """Seconds to wait before the next attempt, at `address`.

        Raises: SplitserveError: the typed error, where none may help.
        """
        typed = self._typed(error)
        delay_s = self._retry.delay_s(self._attempt, typed)
        if isinstance(typed, Unavailable | Overloaded) and self._routers.failed(self.address, typed.retry_after_s):
            delay_s = 0.0 if delay_s is not None else None  # another router can be asked at once
        if delay_s is None or delay_s >= self.left_s():
            raise typed from error
        self._attempt += 1
        self.address = self._routers.pick()
        return delay_s

    def answered(self) -> None:
        """The router did what it was asked."""
        self._routers.answered(self.address)

    def _typed(self, error: grpc.RpcError) -> SplitserveError:
        """The typed error behind a failed call; where gRPC itself ended it, in words that help."""
        typed = from_rpc_error(error)
        metadata: Iterable[tuple[str, str]] = cast(Any, error).trailing_metadata() or ()
        if any(key == ERROR_KEY for key, _ in metadata):
            return typed
        if isinstance(typed, DeadlineExceeded):
            return DeadlineExceeded(f"no end within timeout_s {self._timeout_s:g}; raise it or ask for fewer tokens")
        if isinstance(typed, Cancelled):  # not by us: a stream that we closed is not asked
            return Unavailable(f"router {self.address} broke the call off ({typed.message}); send it again")
        if isinstance(typed, Unavailable):
            return Unavailable(
                f"no router answers at {self.address} ({typed.message}); check the address and `splitserve status`"
            )
        return typed


class Generation(Attempts):
    """One answer being received."""

    def __init__(self, request: pb.GenerateRequest, routers: Rotation, timeout_s: float, retry: RetryPolicy) -> None:
        super().__init__(routers, timeout_s, retry)
        if not request.idempotency_key:
            request.idempotency_key = secrets.token_hex(12)
        self.request = request  # as the next attempt sends it
        self._has_tail = False  # text came without tokens: what the router held back to the end
        self._started: pb.Started | None = None
        self._num_received = len(request.received_token_ids)  # before this call
        self._next_index = self._num_received
        self._token_ids: list[int] = []
        self._token_times_s: list[float] = []
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._result: GenerationResult | None = None

    @property
    def request_id(self) -> str:
        """The router's id of the request; empty until its first message came."""
        return self._started.request_id if self._started else ""

    @property
    def finished(self) -> bool:
        return self._result is not None

    def accept(self, message: pb.GenerateResponse) -> Chunk | None:
        """Take the stream's next message; returns a chunk where it holds tokens or text."""
        at_s = time.monotonic() - self.sent_s
        if message.HasField("started"):
            self._started = message.started
        elif message.HasField("tokens"):
            return self._accept_tokens(message.tokens, at_s)
        elif message.HasField("prompt_logprobs"):
            self._prompt_logprobs = tuple(map(logprob_from_proto, message.prompt_logprobs.tokens))
        elif message.HasField("finished"):
            self._finish(message.finished, at_s)
        return None

    def retry_delay_s(self, error: grpc.RpcError) -> float:
        """As `delay_s`; the next attempt goes on after the tokens that came."""
        if self._next_index > len(self.request.received_token_ids):
            self._attempt = 1
        delay_s = self.delay_s(error)
        self.request = self._next_request()
        self._started = None
        return delay_s

    def _next_request(self) -> pb.GenerateRequest:
        """The same request for whichever router: it takes over from the call that broke, after the tokens that came."""
        request = pb.GenerateRequest()
        request.CopyFrom(self.request)
        request.call += 1
        if self._started is not None and self._token_ids:
            request.received_token_ids.extend(self._token_ids[len(request.received_token_ids) - self._num_received :])
            request.sampling.seed = self._started.seed
            request.ClearField("prompt_logprobs")  # they came before the first token
        return request

    def result(self) -> GenerationResult:
        """Raises: Unavailable: the stream ended, or was left, before the answer did."""
        if self._result is None:
            raise Unavailable("the answer has not ended: read the stream to its end first")
        return self._result

    def end(self) -> None:
        """The stream ended without an error. Raises: Unavailable: it never said Finished."""
        if self._result is None:
            raise Unavailable(f"router {self.address} ended the stream in the middle of the answer; send it again")

    def _accept_tokens(self, tokens: pb.Tokens, at_s: float) -> Chunk:
        if tokens.index != self._next_index:
            raise SplitserveError(
                f"router {self.address} sent token {tokens.index} where {self._next_index} was due; "
                "the answer is dropped, please report this"
            )
        if not tokens.token_ids:
            if self._has_tail:  # sent again: only the end of the answer was lost
                tokens.text = ""
            self._has_tail = True
        self._next_index += len(tokens.token_ids)
        self._token_ids += tokens.token_ids
        self._token_times_s += [at_s] * len(tokens.token_ids)
        self._texts.append(tokens.text)
        logprobs = tuple(map(logprob_from_proto, tokens.logprobs))
        self._logprobs += logprobs
        return Chunk(
            index=tokens.index, token_ids=tuple(tokens.token_ids), text=tokens.text, at_s=at_s, logprobs=logprobs
        )

    def _finish(self, finished: pb.Finished, at_s: float) -> None:
        reason = reason_from_proto(finished.reason)
        if reason is None or self._started is None:
            raise SplitserveError(f"router {self.address} ended the answer without a reason or a start")
        self._result = GenerationResult(
            request_id=self._started.request_id,
            model=self._started.model,
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            finish_reason=reason,
            seed=self._started.seed,
            usage=usage_from_proto(finished.usage),
            timing=timing_from_proto(finished.timing),
            token_times_s=tuple(self._token_times_s),
            e2e_s=self._token_times_s[-1] if self._token_times_s else at_s,
            logprobs=tuple(self._logprobs),
            prompt_logprobs=self._prompt_logprobs,
        )


def check_concurrency(concurrency: int) -> int:
    """Raises: InvalidRequest: nothing would ever be sent."""
    if concurrency < 1:
        raise InvalidRequest(f"concurrency is {concurrency}; it must be at least 1", field="concurrency")
    return concurrency


def closed_error() -> Cancelled:
    """What reading a stream after its close raises."""
    return Cancelled("the stream was closed; its request was cancelled")
