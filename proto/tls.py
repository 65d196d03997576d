"""Mutual TLS: certificates from files, and the role in the cluster that one proves.

A role is a DNS name in the certificate, such as decode.splitserve.internal. Who dials a worker or a router as a part of
the cluster asks for the role's name instead of the host's: one certificate serves a role wherever it runs.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import grpc
import grpc.aio

from ..core.errors import ConfigError
from .rpc import CHANNEL_OPTIONS

logger = logging.getLogger(__name__)

DOMAIN = "splitserve.internal"
Stamps = tuple[tuple[int, int, int], ...]


class PeerRole(Enum):
    """What a certificate lets its holder be."""

    CLIENT = "client"
    OPERATOR = "operator"  # the cluster's controller, and people's commands
    ROUTER = "router"
    PREFILL = "prefill"
    DECODE = "decode"  # colocated workers too
    WORKER = "worker"  # prefill or decode, to operators who dial one; as a caller it may do nothing

    @property
    def dns_name(self) -> str:
        return f"{self.value}.{DOMAIN}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Files of one process, in PEM. A server needs all three; a client may leave out what it has no need of."""

    ca: Path | None = None  # signs the certificates that are trusted; None: the system's authorities
    cert: Path | None = None  # with the chain up to the authority, if there is one
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel. Raises: ConfigError: a file cannot be read, or one of the pair is missing."""
        if (self.cert is None) != (self.key is None):
            raise ConfigError("a certificate and its key go together; name both or none (cert and key)")
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.ca), private_key=_read(self.key), certificate_chain=_read(self.cert)
        )

    def paths(self) -> tuple[Path, Path, Path]:
        """Of a server: authority, certificate, key. Raises: ConfigError: one is not named."""
        if self.ca is None or self.cert is None or self.key is None:
            missing = [name for name in ("ca", "cert", "key") if getattr(self, name) is None]
            raise ConfigError(f"TLS needs ca, cert and key; {' and '.join(missing)} is not set")
        return self.ca, self.cert, self.key


class ServerCertificates:
    """Credentials of a gRPC server that asks its peers for certificates and looks at its files at each handshake."""

    def __init__(self, tls: Tls, on_handshake: Callable[[], None]) -> None:
        """Raises: ConfigError: a file cannot be read, or they do not belong together."""
        self._paths = tls.paths()
        self._on_handshake = on_handshake
        _ssl_context(tls, ssl.CERT_REQUIRED)  # gRPC's own errors do not say what is wrong
        self._stamps = stamps(self._paths)
        self.credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            self._read(), self._fetch, require_client_authentication=True
        )

    def _read(self) -> grpc.ServerCertificateConfiguration:
        ca, cert, key = (_read(path) for path in self._paths)
        return grpc.ssl_server_certificate_configuration([(key, cert)], ca)

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """At a handshake, in a thread of gRPC's. None keeps what is there; gRPC does so too with a pair that does not
        match, as when one file of two has been replaced."""
        self._on_handshake()
        try:
            seen = stamps(self._paths)
            if seen == self._stamps:
                return None
            made = self._read()
        except (ConfigError, OSError) as error:
            logger.error("cannot read the TLS files again: %s; those read before stay in use", error)
            return None
        self._stamps = seen
        logger.info("read the TLS files again")
        return made


def open_channel(address: str, tls: Tls | None, server: PeerRole | None = None) -> grpc.aio.Channel:
    """A channel whose files are read now. Raises: ConfigError.

    Args: server: the role that the other side must prove, whatever its host is called; None: the host's name counts.
    """
    if tls is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(address, tls.credentials(), options=_options(server))


def open_blocking_channel(address: str, tls: Tls | None, server: PeerRole | None = None) -> grpc.Channel:
    """The same for threads."""
    if tls is None:
        return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.secure_channel(address, tls.credentials(), options=_options(server))


def _options(server: PeerRole | None) -> Sequence[tuple[str, int | str]]:
    named = [("grpc.ssl_target_name_override", server.dns_name)] if server is not None else []
    return [*CHANNEL_OPTIONS, *named]


def roles_of(auth_context: Mapping[str, Collection[bytes]]) -> frozenset[PeerRole]:
    """What the peer's certificate says that it is; gRPC has verified it."""
    names = {name.decode("ascii", "replace") for name in auth_context.get("peer_dns", ())}
    return frozenset(role for role in PeerRole if role.dns_name in names)


def stamps(paths: Collection[Path]) -> Stamps:
    """Changes when a file does. Raises: OSError."""
    found = (path.stat() for path in paths)
    return tuple((status.st_mtime_ns, status.st_size, status.st_ino) for status in found)


def reloading_context(
    tls: Tls, *, verify: ssl.VerifyMode = ssl.CERT_REQUIRED, on_handshake: Callable[[], None] = lambda: None
) -> ssl.SSLContext:
    """Of a server that is not gRPC's: it looks at its files at each handshake too. Raises: ConfigError."""
    paths = tls.paths()
    newest, seen = _ssl_context(tls, verify), stamps(paths)

    def choose(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        nonlocal seen, newest
        on_handshake()
        try:
            if (now := stamps(paths)) != seen:
                seen, newest = now, _ssl_context(tls, verify)
        except (ConfigError, OSError) as error:
            logger.error("cannot read the TLS files again: %s; those read before stay in use", error)
        connection.context = newest

    made = _ssl_context(tls, verify)
    made.sni_callback = choose
    return made


def probes_context(tls: Tls | None) -> ssl.SSLContext | None:
    """Of the server of metrics and probes: it asks for certificates and judges by itself who needs one."""
    return None if tls is None else reloading_context(tls, verify=ssl.CERT_OPTIONAL)


def _ssl_context(tls: Tls, verify: ssl.VerifyMode) -> ssl.SSLContext:
    """Raises: ConfigError: the files do not make one."""
    ca, cert, key = tls.paths()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key)
        context.load_verify_locations(ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"cannot use the TLS files {ca}, {cert} and {key}: {error}") from error
    context.verify_mode = verify
    return context


def _read(path: Path | None) -> bytes | None:
    try:
        return path.read_bytes() if path is not None else None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; check the TLS options") from error
