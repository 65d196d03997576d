"""`round_robin`: request number n goes to prefill worker n and decode worker n, counted round and round."""

from __future__ import annotations

from ..routing import Placement, Snapshot
from .candidates import decode_candidates, pair, prefill_candidates


def round_robin(snapshot: Snapshot) -> Placement | None:
    """Whatever the load: a request waits for its worker while others stand idle."""
    turn = snapshot.request.turn
    prefills, decodes = prefill_candidates(snapshot), decode_candidates(snapshot)
    prefill = prefills[turn % len(prefills)] if prefills else None
    decode = decodes[turn % len(decodes)] if decodes else None
    return pair(snapshot, prefill, decode)
