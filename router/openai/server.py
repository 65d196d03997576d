"""Serves the application on the router's event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Generator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from ...core.errors import AddressInUse
from .connections import CLIENT_SILENCE_S, BoundedProtocol, bound_silence
from .tls import HttpTls, configure


class HttpServer:
    """One uvicorn server, bound at once or refused with a clear error.

    Args: silence_s: a client that takes nothing of its answer for so long is given up.
    Raises: AddressInUse.
    """

    def __init__(
        self, app: Starlette, host: str, port: int, tls: HttpTls | None = None, silence_s: float = CLIENT_SILENCE_S
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=2_048)
        except OSError as error:
            raise AddressInUse(
                f"cannot serve HTTP on {host}:{port}: {error.strerror or error}; "
                "choose another --http-port (0 takes a free one, -1 serves none)"
            ) from error
        # Accepted connections inherit it. asyncio sets it only for sockets made with the protocol's number, and without
        # it a response of two packets waits 40 ms for the client's delayed acknowledgement.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        bound_silence(self._socket, silence_s)
        self._socket.setblocking(False)
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            app,
            http=BoundedProtocol,
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,
        )
        if tls is not None:
            configure(config, tls)
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._server.serve([self._socket]))
        await self._server.listening.wait()

    async def stop(self) -> None:
        """Close what is idle, give the rest a second."""
        if self._task is None:
            self._socket.close()
            return
        self._server.should_exit = True
        await self._task


class _Server(uvicorn.Server):
    """Says when it listens, and leaves signals to the router."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield
