"""`session`: the requests of one conversation go to the same pair, as long as it is there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from ..routing import DecodeLoad, Placement, PrefillLoad, Snapshot
from .candidates import decode_candidates, pair, prefill_candidates
from .least_loaded import least_loaded

L = TypeVar("L", PrefillLoad, DecodeLoad)


def session(snapshot: Snapshot) -> Placement | None:
    """Rendezvous hashing: a worker that comes or goes moves only its own conversations.

    Knows neither caches nor loads; a request of no conversation goes where the load is least.
    """
    key = snapshot.request.session
    if not key:
        return least_loaded(snapshot)
    return pair(snapshot, _highest(prefill_candidates(snapshot), key), _highest(decode_candidates(snapshot), key))


def _highest(loads: Sequence[L], key: bytes) -> L | None:
    return max(loads, key=lambda load: _weight(load.worker, key), default=None)


def _weight(worker: str, key: bytes) -> bytes:
    return hashlib.blake2b(worker.encode(), key=key[:64], digest_size=8).digest()
