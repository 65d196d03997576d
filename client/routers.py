"""Several routers as one: who is asked next, and how each is reached."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from ..core.errors import ConfigError

_REST_S = 1.0  # after the first failure; doubles
_MAX_REST_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """An encrypted connection; its files are PEM. Without a root certificate the system's are trusted."""

    root_certificate: Path | None = None
    client_certificate: Path | None = None  # for routers that ask who calls
    client_key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises: ConfigError: a file cannot be read, or one of the client's two is missing."""
        if (self.client_certificate is None) != (self.client_key is None):
            raise ConfigError("a client certificate and its key go together; name both or none")
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.root_certificate),
            private_key=_read(self.client_key),
            certificate_chain=_read(self.client_certificate),
        )


class Rotation:
    """Round robin over the routers; one that fails rests, longer each time, while others can be asked.

    Every method may be called from any thread.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self.addresses = tuple(addresses)
        self._lock = threading.Lock()
        self._next = random.randrange(len(self.addresses))  # many clients do not all begin with the same
        self._failures = dict.fromkeys(self.addresses, 0)
        self._rests_until = dict.fromkeys(self.addresses, 0.0)

    def pick(self) -> str:
        """The next in turn that does not rest; if all do, the one whose rest ends first."""
        now = time.monotonic()
        with self._lock:
            turn = self.addresses[self._next :] + self.addresses[: self._next]
            found = min(turn, key=lambda address: max(0.0, self._rests_until[address] - now))
            self._next = (self.addresses.index(found) + 1) % len(self.addresses)
            return found

    def failed(self, address: str, retry_after_s: float | None = None) -> bool:
        """It cannot serve now. Returns whether another can be asked at once."""
        now = time.monotonic()
        with self._lock:
            rest_s = min(_MAX_REST_S, _REST_S * 2.0 ** self._failures[address])
            self._failures[address] += 1
            self._rests_until[address] = now + max(rest_s, retry_after_s or 0.0)
            return any(until <= now for until in self._rests_until.values())

    def answered(self, address: str) -> None:
        """It serves again."""
        with self._lock:
            self._failures[address] = 0
            self._rests_until[address] = 0.0


def key_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """What proves who calls: the key given, or that of SPLITSERVE_API_KEY."""
    key = api_key if api_key is not None else os.environ.get("SPLITSERVE_API_KEY")
    return (("authorization", f"Bearer {key}"),) if key else ()


def _read(path: Path | None) -> bytes | None:
    try:
        return path.read_bytes() if path is not None else None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; check the TLS options") from error
