"""The small HTTP server of every process: /metrics for Prometheus, /healthz and /readyz for whoever keeps it alive.

It runs in threads of its own, so it answers, and tells the truth, also when the process's event loop hangs.
"""

from __future__ import annotations

import logging
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from .errors import AddressInUse

logger = logging.getLogger(__name__)

_IDLE_S = 30.0  # of a kept-open connection


@dataclass(frozen=True, slots=True)
class Probes:
    """A server that runs. Until it is stopped it keeps whatever it asks alive."""

    port: int
    _server: ThreadingHTTPServer

    def stop(self) -> None:
        """Any thread; it is over within half a second, and nobody has to wait for that."""
        threading.Thread(target=self._end, name="end of probes", daemon=True).start()

    def _end(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def serve_probes(
    host: str,
    port: int,
    *,
    registry: Callable[[], CollectorRegistry],
    alive: Callable[[], str],
    ready: Callable[[], str],
    tls: ssl.SSLContext | None = None,
) -> Probes:
    """Serve in daemon threads.

    Args:
        alive, ready: called from those threads; "" is yes (200), anything else the reason why not (503).
        tls: encrypts, and keeps /metrics to peers with a certificate; what asks for the others seldom has one.
    Raises: AddressInUse.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = _IDLE_S

        def do_GET(self) -> None:
            match self.path.partition("?")[0]:
                case "/healthz":
                    self._judge(alive())
                case "/readyz":
                    self._judge(ready())
                case "/" | "/metrics" if self._is_nobody():
                    self._answer(403, b"metrics are for those with a certificate of this cluster\n")
                case "/" | "/metrics":
                    encode, content_type = choose_encoder(self.headers.get("accept", ""))
                    self._answer(200, encode(registry()), content_type)
                case _:
                    self._answer(404, b"not found; try /metrics, /healthz or /readyz\n")

        do_HEAD = do_GET

        def _is_nobody(self) -> bool:
            return isinstance(self.connection, ssl.SSLSocket) and not self.connection.getpeercert()

        def _judge(self, reason: str) -> None:
            self._answer(503 if reason else 200, f"{reason or 'ok'}\n".encode())

        def _answer(self, status: int, body: bytes, content_type: str = "text/plain; charset=utf-8") -> None:
            self.send_response(status)
            self.send_header("content-type", content_type)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """A probe a second is no news."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        def get_request(self) -> tuple[socket.socket, Any]:
            connection, address = super().get_request()
            if tls is not None:  # the handshake is its handler's: a peer that never makes one holds no other up
                connection = tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
            return connection, address

        def handle_error(self, request: object, client_address: object) -> None:
            logger.info("%s was not answered: %s", client_address, sys.exception())

    try:
        server = Server((host, port), Handler)
    except OSError as error:
        raise AddressInUse(f"cannot serve metrics on {host}:{port}: {error}; choose another --metrics-port") from error
    threading.Thread(target=server.serve_forever, name="probes", daemon=True).start()
    return Probes(int(server.server_port), server)
