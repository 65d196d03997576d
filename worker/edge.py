"""What every role's gRPC edge shares: opening a router's session, and naming an attempt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import grpc.aio

from ..core.errors import InvalidRequest, ProtocolMismatch, SplitserveError
from ..core.request import Request
from ..proto import worker_pb2
from ..proto.convert import check_protocol, request_from_proto
from ..proto.rpc import abort
from .host import WorkerHost
from .session import Session

HELLO_TIMEOUT_S = 5.0

Out = TypeVar("Out")


async def open_session(
    context: grpc.aio.ServicerContext[Any, Any],
    host: WorkerHost,
    *,
    hello: Out,
    status: Callable[[Session[Any, Out]], Out],
) -> Session[Any, Out]:
    """Read the router's hello and answer with ours; a bad one ends the call with a typed status."""
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            first: Any = await context.read()
        if first is grpc.aio.EOF or first.WhichOneof("message") != "hello":
            raise ProtocolMismatch("the first message of a session must be a hello")
        check_protocol(first.hello.protocol_version, f"router {first.hello.router_id}")
    except TimeoutError:
        await abort(context, ProtocolMismatch(f"no hello came within {HELLO_TIMEOUT_S:g} s"))
    except SplitserveError as error:
        await abort(context, error)
    await context.write(hello)
    session: Session[Any, Out] = Session(first.hello.router_id, status)
    host.session_began(session)
    return session


def sequence_id(request_id: str, attempt: int) -> str:
    """Name of one attempt inside a worker: attempts of one request never share blocks, tokens or grants."""
    return f"{request_id}#{attempt}"


def sequence_from_proto(message: worker_pb2.WorkRequest) -> Request:
    """The request as the engine sees it: its id is the attempt's `sequence_id`. Raises: InvalidRequest."""
    if 0 < message.max_tokens <= len(message.output_token_ids):
        raise InvalidRequest(
            f"output_token_ids holds {len(message.output_token_ids)} tokens already, max_tokens is "
            f"{message.max_tokens}: there is none left to compute",
            field="output_token_ids",
        )
    return request_from_proto(message, sequence_id(message.request_id, message.attempt))
