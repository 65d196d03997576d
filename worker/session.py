"""One router's session on a worker: an outbox that the event loop fills and a writer that drains it to gRPC."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

import grpc.aio

from ..scheduling.prefix_feed import PrefixFeed

MAX_OUTBOX = 20_000  # messages; a router that reads nothing for this long is cut off
STATUS_PERIOD_S = 0.5

In = TypeVar("In")
Out = TypeVar("Out")


class Session(Generic[In, Out]):
    """Messages to one router, in order, with a status at least every STATUS_PERIOD_S."""

    def __init__(self, router_id: str, status: Callable[[Session[In, Out]], Out]) -> None:
        self.router_id = router_id
        self.prefixes: PrefixFeed | None = None  # what this router has not been told of the prefix cache
        self._status = status
        self._status_due = True
        self._outbox: deque[Out] = deque()
        self._wake = asyncio.Event()
        self._wake.set()  # the first status goes out at once: a router places nothing on what it knows nothing of
        self._ending = False
        self._handler = asyncio.current_task()

    def send(self, message: Out) -> None:
        """Queue a message. A router that no longer reads is disconnected rather than buffered for without bound."""
        if len(self._outbox) >= MAX_OUTBOX:
            self.abort()
            return
        self._outbox.append(message)
        self._wake.set()

    def status_changed(self) -> None:
        """Send a status with the next write."""
        self._status_due = True
        self._wake.set()

    def announce_status(self) -> None:
        """Queue a status: the router knows it before it reads whatever is sent after this."""
        self.send(self._status(self))

    def end(self) -> None:
        """Write what is queued, then end the call: the router sees a session that is over, not one that broke."""
        self._ending = True
        self._wake.set()

    def abort(self) -> None:
        """Cut the call off."""
        if self._handler is not None:
            self._handler.cancel()

    async def run(
        self,
        context: grpc.aio.ServicerContext[In, Out],
        handle: Callable[[In], None],
        pause: Callable[[In], Awaitable[None]] | None = None,
    ) -> None:
        """Read and write until the router closes its side, the call is cancelled or `end` was called.

        Args: pause: waits until a message may be handled; those behind it wait too.
        """
        writer = asyncio.create_task(self._write(context))
        reader = asyncio.create_task(self._read(context, handle, pause))
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            writer.cancel()
            reader.cancel()
            failures = await asyncio.gather(reader, writer, return_exceptions=True)
        for failure in failures:
            if isinstance(failure, Exception) and not isinstance(failure, grpc.aio.BaseError):  # those: the router left
                raise failure

    async def _read(
        self,
        context: grpc.aio.ServicerContext[In, Out],
        handle: Callable[[In], None],
        pause: Callable[[In], Awaitable[None]] | None,
    ) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            if pause is not None:
                await pause(message)
            handle(message)

    async def _write(self, context: grpc.aio.ServicerContext[Any, Out]) -> None:
        due_s = time.monotonic() + STATUS_PERIOD_S  # also of a session whose tokens wake it all the time
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(due_s - time.monotonic()):
                    await self._wake.wait()
            self._wake.clear()
            while self._outbox:
                await context.write(self._outbox.popleft())
            if self._ending:
                return
            if self._status_due or time.monotonic() >= due_s:
                self._status_due, due_s = False, time.monotonic() + STATUS_PERIOD_S
                await context.write(self._status(self))
