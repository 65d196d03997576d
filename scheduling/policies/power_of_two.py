"""`power_of_two`: of two workers drawn at random the less loaded one, for prefill and for decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from ..routing import Placement, Snapshot
from .candidates import decode_candidates, pair, prefill_candidates, roomiest

T = TypeVar("T")


def power_of_two(snapshot: Snapshot) -> Placement | None:
    """Needs no view of the whole cluster, and never sends all to the one that was idle a moment ago."""
    draw = snapshot.request.draw
    prefills = _two(prefill_candidates(snapshot), draw)
    prefill = min(prefills, key=snapshot.wait_s, default=None)
    return pair(snapshot, prefill, roomiest(_two(decode_candidates(snapshot), draw >> 32)))


def _two(loads: Sequence[T], draw: int) -> Sequence[T]:
    """Two different ones; all if there are no more than two."""
    if len(loads) <= 2:
        return loads
    first = draw % len(loads)
    second = (draw >> 16) % (len(loads) - 1)
    return (loads[first], loads[second + (second >= first)])
