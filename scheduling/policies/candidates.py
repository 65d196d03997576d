"""What all policies agree on: whom a request avoids, who has room, and what happens while no prefill worker lives."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol, TypeVar

from ..routing import DecodeLoad, Placement, PrefillLoad, Snapshot


class _Load(Protocol):
    @property
    def worker(self) -> str: ...


L = TypeVar("L", bound=_Load)


def not_avoided(loads: Sequence[L], avoid: Collection[str]) -> Sequence[L]:
    """Those that have not failed this request; all if there is no other."""
    return [load for load in loads if load.worker not in avoid] or loads if avoid else loads


def prefill_candidates(snapshot: Snapshot) -> Sequence[PrefillLoad]:
    return not_avoided(snapshot.view.prefills, snapshot.avoid)


def decode_candidates(snapshot: Snapshot) -> Sequence[DecodeLoad]:
    """While no prefill worker lives: those that compute prompts by themselves."""
    decodes: Sequence[DecodeLoad] = snapshot.view.decodes
    if not snapshot.view.any_prefill_alive:
        decodes = [load for load in decodes if load.colocated]
    return not_avoided(decodes, snapshot.avoid)


def roomiest(decodes: Sequence[DecodeLoad]) -> DecodeLoad | None:
    """Most KV to spare, then fewest sequences."""
    return min(decodes, key=lambda load: (-load.available_blocks, load.num_sequences), default=None)


def pair(snapshot: Snapshot, prefill: PrefillLoad | None, decode: DecodeLoad | None) -> Placement | None:
    """The placement of what was chosen; while no prefill worker lives, of the decode worker alone."""
    if decode is None:
        return None
    if not snapshot.view.any_prefill_alive:
        return Placement(prefill=None, decode=decode.worker)
    return Placement(prefill=prefill.worker, decode=decode.worker) if prefill is not None else None
