"""`prefix`: the pair that has an answer's first tokens out soonest, counting what each worker's cache already holds.

Score of a pair, in seconds, lowest wins:

    wait + prefill + exposed transfer + FIRST_TOKENS * decode step + FULL_S * fill^4   when they would be there
    + PREFILL_WEIGHT * prefill                                                         whom it keeps waiting
    + LATE_WEIGHT * max(0, wait + prefill - slack)                                     what is late anyway

where prefill = uncached prompt tokens / speed, and fill is the share of KV blocks that the decode worker would have in
use. docs/routing.md explains the terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...core.kv_geometry import blocks_for
from ..links import link_between
from ..local_prefill import local_decode
from ..routing import DecodeLoad, Placement, PrefillLoad, Snapshot
from .candidates import decode_candidates, pair, prefill_candidates

FIRST_TOKENS = 32  # of the answer, that a slow decode step counts for
FULL_S = 1.0  # a full decode worker: whoever is preempted there computes its context again
PREFILL_WEIGHT = 1.0  # work saved here is a shorter wait for those behind
LATE_WEIGHT = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decode:
    """What a decode worker adds to a score."""

    load: DecodeLoad
    cost_s: float
    moved_bytes: float


def prefix(snapshot: Snapshot) -> Placement | None:
    """Prefill and decode worker chosen together. May be a prefill worker that is not open yet: worth waiting for."""
    decodes = _with_room(snapshot, decode_candidates(snapshot))
    if not decodes:
        return None
    if not snapshot.view.any_prefill_alive:
        return pair(snapshot, None, min(decodes, key=lambda load: _alone_s(snapshot, load)))
    if (local := local_decode(snapshot, decodes)) is not None:
        return Placement(prefill=None, decode=local.worker)
    best: tuple[float, PrefillLoad, DecodeLoad] | None = None
    steps_s = [_step_s(snapshot, load) for load in decodes]
    # As a free one, a worker that has not decoded yet would draw everybody.
    unknown_s = min(filter(None, steps_s), default=0.0)
    weighed = [_weigh(snapshot, load, step_s or unknown_s) for load, step_s in zip(decodes, steps_s, strict=True)]
    if all(load.place is None for load in decodes):  # every link is the same, so one of them is best for all
        weighed = [min(weighed, key=lambda decode: (decode.cost_s, decode.load.num_sequences))]
    cheapest_s = min(decode.cost_s for decode in weighed)
    for prefill in prefill_candidates(snapshot):
        prefill_s = prefill.compute_s(snapshot.uncached_tokens(prefill.worker))
        ttft_s = snapshot.wait_s(prefill) + prefill_s
        slack_s = snapshot.request.ttft_slack_s
        late_s = max(0.0, ttft_s - slack_s) if slack_s is not None else 0.0
        cost_s = ttft_s + PREFILL_WEIGHT * prefill_s + LATE_WEIGHT * late_s
        if best is not None and cost_s + cheapest_s >= best[0]:
            continue  # whatever the link
        for decode in weighed:
            transfer_s = link_between(prefill.place, decode.load.place).transfer_s(decode.moved_bytes)
            score = cost_s + decode.cost_s + max(0.0, transfer_s - prefill_s)
            if best is None or score < best[0]:
                best = score, prefill, decode.load
    return Placement(prefill=best[1].worker, decode=best[2].worker) if best is not None else None


def _with_room(snapshot: Snapshot, decodes: Sequence[DecodeLoad]) -> Sequence[DecodeLoad]:
    """Those that have the blocks; all if nobody has, for blocks may be freed before the request gets there."""
    return [
        load
        for load in decodes
        if blocks_for(snapshot.uncached_tokens(load.worker), load.block_size) <= load.available_blocks
    ] or decodes


def _step_s(snapshot: Snapshot, load: DecodeLoad) -> float:
    """Of the worker with one sequence more; 0 when unknown."""
    if load.times is None:
        return 0.0
    return load.times.decode_step_s(load.num_sequences + 1, load.context_tokens + snapshot.request.num_tokens)


def _weigh(snapshot: Snapshot, load: DecodeLoad, step_s: float) -> _Decode:
    moved = snapshot.uncached_tokens(load.worker)
    left = load.available_blocks - blocks_for(moved, load.block_size)
    fill = min(1.0, max(0.0, 1 - left / load.num_blocks)) if load.num_blocks else 1.0
    return _Decode(
        load=load,
        cost_s=FIRST_TOKENS * step_s + FULL_S * fill**4,
        moved_bytes=moved * snapshot.view.kv_bytes_per_token,
    )


def _alone_s(snapshot: Snapshot, load: DecodeLoad) -> float:
    """Score of a worker that computes the prompt and answers by itself."""
    uncached = load.local_prefill_tokens + snapshot.uncached_tokens(load.worker)
    prefill_s = load.times.prefill_step_s([(uncached, 0)]) if load.times is not None else 0.0
    return (1 + PREFILL_WEIGHT) * prefill_s + _weigh(snapshot, load, _step_s(snapshot, load)).cost_s
