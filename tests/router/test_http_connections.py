"""HTTP connections that hang, say nothing or are too many, against a server that streams for ever."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from splitserve.core.errors import SplitserveError
from splitserve.router.openai import body
from splitserve.router.openai.connection import EventStream
from splitserve.router.openai.connections import BoundedProtocol
from splitserve.router.openai.errors import on_typed_error
from splitserve.router.openai.requests import DetokenizeRequest
from splitserve.router.openai.server import HttpServer
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

WAIT_S = 60.0


class Endless:
    """An answer without an end, and when somebody stopped making it."""

    def __init__(self) -> None:
        self.freed = asyncio.Event()

    async def chunks(self) -> AsyncGenerator[Mapping[str, Any]]:
        try:
            while True:
                await asyncio.sleep(0)
                yield {"text": "x" * 65_536}
        finally:
            self.freed.set()

    async def answer(self, request: Request) -> Response:
        return EventStream({}, self.chunks(), {}, chat=False)


@asynccontextmanager
async def served(route: Route, **options: float) -> AsyncIterator[tuple[str, int]]:
    app = Starlette(routes=[route], exception_handlers={SplitserveError: on_typed_error})
    server = HttpServer(app, "127.0.0.1", 0, **options)  # type: ignore[arg-type]
    await server.start()
    host, _, port = server.address.rpartition(":")
    yield host, int(port)
    await server.stop()


async def test_a_client_that_does_not_read_is_given_up_and_its_work_freed() -> None:
    answer = Endless()
    async with served(Route("/", answer.answer), silence_s=0.5) as address:
        with socket.create_connection(address) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            client.sendall(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
            async with asyncio.timeout(WAIT_S):
                await answer.freed.wait()


async def test_a_client_that_reads_slowly_is_not_given_up() -> None:
    answer = Endless()
    async with served(Route("/", answer.answer), silence_s=30.0) as address:
        reader, writer = await asyncio.open_connection(*address, limit=4_096)
        writer.write(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
        for _ in range(2_000):  # more than all buffers between the two
            await reader.readexactly(4_096)
        assert not answer.freed.is_set()
        writer.close()
        async with asyncio.timeout(WAIT_S):
            await answer.freed.wait()


async def test_a_connection_past_the_bound_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedProtocol, "max_connections", 1)
    async with served(Route("/", Endless().answer)) as address:
        _, first = await asyncio.open_connection(*address)
        reader, second = await asyncio.open_connection(*address)
        second.write(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
        async with asyncio.timeout(WAIT_S):
            head, _, refusal = (await reader.read()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 429 ")
        assert b"retry-after: 1\r\n" in head
        assert json.loads(refusal)["error"]["code"] == "overloaded"
        for writer in (second, first):
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


async def test_a_connection_that_asks_for_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedProtocol, "first_request_s", 0.05)
    async with served(Route("/", Endless().answer)) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET / HTTP/1.1\r\nhost: ")  # and never the rest
        async with asyncio.timeout(WAIT_S):
            assert await reader.read() == b""
        writer.close()


async def test_a_connection_that_begins_another_request_and_stops_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's own patience with idle connections ends at the first byte."""
    monkeypatch.setattr(BoundedProtocol, "first_request_s", 0.2)

    async def ping(request: Request) -> Response:
        return Response(b"pong")

    async with served(Route("/", ping)) as address:
        reader, writer = await asyncio.open_connection(*address)
        async with asyncio.timeout(WAIT_S):
            for _ in range(3):
                writer.write(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
                assert (await reader.readuntil(b"pong")).startswith(b"HTTP/1.1 200 ")
            for byte in (b"G", b"E", b"T"):
                writer.write(byte)
                await asyncio.sleep(0.01)
            assert await reader.read() == b""
        writer.close()


async def test_a_body_that_stops_coming_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "BODY_S", 0.05)

    async def read(request: Request) -> Response:
        await body.read_body(request, DetokenizeRequest)
        raise AssertionError("the body was never sent")

    async with served(Route("/", read, methods=["POST"])) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"POST / HTTP/1.1\r\nhost: here\r\ncontent-length: 100\r\n\r\n{")
        async with asyncio.timeout(WAIT_S):
            assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
        writer.close()
