"""Several routers as one: who is asked next, and how each is reached."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from ..proto.tls import PeerRole, Tls

_REST_S = 1.0  # after the first failure; doubles
_MAX_REST_S = 30.0
_MAX_DOUBLINGS = 5


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
            rest_s = min(_MAX_REST_S, _REST_S * 2.0 ** min(self._failures[address], _MAX_DOUBLINGS))
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


def find_tls(tls: Tls | None = None, role: PeerRole = PeerRole.CLIENT) -> Tls | None:
    """The files given, or those of SPLITSERVE_TLS_CA, _CERT and _KEY, where {role} stands for ours; None: no TLS."""
    if tls is not None:
        return tls
    named = {name: os.environ.get(f"SPLITSERVE_TLS_{name.upper()}") for name in ("ca", "cert", "key")}
    paths = {name: Path(text.replace("{role}", role.value)) for name, text in named.items() if text}
    return Tls(**paths) if paths else None
