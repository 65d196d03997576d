"""Bounds of HTTP connections: how many there may be, and how long one may be silent while something is due from it."""

from __future__ import annotations

import asyncio
import json
import socket

from uvicorn.protocols.http.h11_impl import H11Protocol

from ...core.errors import Overloaded
from .errors import body_of

MAX_CONNECTIONS = 4_096
FIRST_REQUEST_S = 10.0  # from a new connection to its first request
CLIENT_SILENCE_S = 10.0  # for which a client may take nothing of what is sent to it
_RETRY_AFTER_S = 1
_PROBE_S = 5  # idle connections are probed as often: a host that is gone ends its requests, which may still be queued


def bound_silence(listening: socket.socket, silence_s: float = CLIENT_SILENCE_S) -> None:
    """Let the kernel end accepted connections whose client takes nothing, or is gone: they inherit these options.

    HTTP/1.1 has no ping. The kernel counts both acknowledgements that do not come and a window that stays shut.
    """
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_S)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_S)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(silence_s * 1000))


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol that refuses connections past the bound, and ends those that ask for nothing."""

    max_connections = MAX_CONNECTIONS
    first_request_s = FIRST_REQUEST_S
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._ends_unless_asked: asyncio.TimerHandle | None = None
        self._await_request()
        if len(self.connections) > self.max_connections:
            self._refused = True
            transport.write(_refusal(self.max_connections))
            if transport.can_write_eof():
                transport.write_eof()  # not closed: a request on its way would be reset, and this answer with it
            else:
                transport.close()

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)
            self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._ends_unless_asked is not None:
            self._ends_unless_asked.cancel()
        super().connection_lost(exc)

    @property
    def _is_asked(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_request(self) -> None:
        """What came may be the beginning of a request: its end is due in time, and further bytes do not put it off."""
        if self._is_asked and self._ends_unless_asked is not None:
            self._ends_unless_asked.cancel()
            self._ends_unless_asked = None
        elif not self._is_asked and self._ends_unless_asked is None:
            self._ends_unless_asked = self.loop.call_later(self.first_request_s, self._close_unless_asked)

    def _close_unless_asked(self) -> None:
        self._ends_unless_asked = None
        if not self._is_asked and not self.transport.is_closing():
            self.transport.close()


def _refusal(max_connections: int) -> bytes:
    error = Overloaded(f"the router has {max_connections:,} HTTP connections, its limit; try again")
    body = json.dumps(body_of(error)).encode()
    head = f"HTTP/1.1 {error.http_status} Too Many Requests\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}\r\nretry-after: {_RETRY_AFTER_S}\r\nconnection: close\r\n\r\n"
    return head.encode() + body
