"""What ties work to its HTTP connection: a client that goes away cancels it, and chunks leave as they are made."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...core.errors import Cancelled, SplitserveError
from .errors import body_of

T = TypeVar("T")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, whose request body was read. Raises: Cancelled: the client went away, and the work was cancelled."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Cancelled("the client went away")
    finally:
        for each in (gone, task):
            each.cancel()
        with suppress(asyncio.CancelledError, SplitserveError):
            await task  # what it holds is free when we return


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events: each chunk is one `data:` line; the last is [DONE], or an error.

    Made by `open_stream`, when the first chunk is there: what fails before it has an HTTP status of its own.
    """

    media_type = "text/event-stream"

    def __init__(
        self, first: Mapping[str, Any], rest: AsyncGenerator[Mapping[str, Any]], headers: Mapping[str, str], chat: bool
    ) -> None:
        super().__init__(None, headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._chat = chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(Cancelled):  # nobody is left to be told
            await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with aclosing(self._rest) as rest:
                await _send_event(send, self._first)
                async for chunk in rest:
                    await _send_event(send, chunk)
        except SplitserveError as error:
            await _send_event(send, body_of(error, chat=self._chat))
        else:
            await _send_line(send, b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def open_stream(
    request: Request, chunks: AsyncGenerator[Mapping[str, Any]], headers: Mapping[str, str], *, chat: bool = False
) -> EventStream:
    """Raises: SplitserveError: there is no first chunk."""
    first = await while_connected(request.receive, _next(chunks))
    return EventStream(first, chunks, headers, chat)


async def _next(chunks: AsyncGenerator[Mapping[str, Any]]) -> Mapping[str, Any]:
    return await anext(chunks)


async def _send_event(send: Send, chunk: Mapping[str, Any]) -> None:
    await _send_line(send, b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n")


async def _send_line(send: Send, line: bytes) -> None:
    await send({"type": "http.response.body", "body": line, "more_body": True})
