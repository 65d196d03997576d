"""TLS of the HTTP edge: the router's certificate, and who a client's certificate says that it is."""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import Any

import uvicorn

from ...core.metrics import LinkMetrics
from ...proto.tls import PeerRole, Tls, reloading_context, roles_of
from .connections import BoundedProtocol

logger = logging.getLogger(__name__)

_ALLOWED = frozenset({PeerRole.CLIENT, PeerRole.OPERATOR})


class HttpTls:
    """What the HTTP server needs to know.

    Args:
        ask: clients must have a certificate; else the ones that they have are looked at.
    """

    def __init__(self, tls: Tls, links: LinkMetrics, *, ask: bool) -> None:
        """Raises: ConfigError: the files cannot be used."""
        self._links = links
        verify = ssl.CERT_REQUIRED if ask else ssl.CERT_OPTIONAL
        self.context = reloading_context(tls, verify=verify, on_handshake=links.tls_begun.inc)

    def admits(self, certificate: dict[str, Any] | None) -> bool:
        """Whether a connection may stay; a verified certificate of a worker or router is no client's."""
        self._links.tls_accepted.inc()
        if not certificate:
            return True
        names = [value.encode() for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"]
        if roles_of({"peer_dns": names}) & _ALLOWED:
            return True
        self._links.refused.labels("role").inc()
        return False


def protocol_of(tls: HttpTls) -> type[asyncio.Protocol]:
    """uvicorn's protocol that closes connections of peers with another role before it reads from them."""

    class CheckedProtocol(BoundedProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if not tls.admits(transport.get_extra_info("peercert")):
                logger.warning("refused: the certificate of %s is not of a client", self.client)
                transport.close()

    return CheckedProtocol


def configure(config: uvicorn.Config, tls: HttpTls) -> None:
    """Serve TLS; uvicorn's own options cannot reload files."""
    config.http = protocol_of(tls)
    config.ssl_context_factory = lambda _config, _default: tls.context
