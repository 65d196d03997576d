"""`least_loaded`: the shortest wait among prefill workers that are open, the decode worker with most room."""

from __future__ import annotations

from ..routing import Placement, Snapshot
from .candidates import decode_candidates, pair, roomiest


def least_loaded(snapshot: Snapshot) -> Placement | None:
    """One queue for all workers: a request stays in it until a worker has room, and goes to the first that does."""
    bound_s, avoid = snapshot.view.prefill_bound_s, snapshot.avoid
    open_prefills = [load for load in snapshot.view.prefills if load.is_open(bound_s)]
    prefill = min(open_prefills, key=lambda load: (load.worker in avoid, load.wait_s), default=None)
    return pair(snapshot, prefill, roomiest(decode_candidates(snapshot)))
