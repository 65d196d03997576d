"""`prefix`: the pair that has an answer's first tokens out soonest, counting what each worker's cache already holds.

Score of a pair, in seconds, lowest wins:

    wait + prefill + exposed transfer + FIRST_TOKENS * decode step + FULL_S * fill^4   when they would be there
    + PREFILL_WEIGHT * prefill                                                         whom it keeps waiting
    + LATE_WEIGHT * max(0, wait + prefill - slack)                                     what is late anyway

where prefill = uncached prompt tokens / speed, and fill is the share of KV blocks that the decode worker would have in
use. docs/routing.md explains the terms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...core.kv_geometry import blocks_for
from ..decode_cost import decode_cost_s, joined_step_s, least_cost_s
from ..links import link_between
from ..local_prefill import local_decode
from ..ranked_loads import DecodeLoads, PrefillLoads
from ..routing import DecodeLoad, Placement, PrefillLoad, Snapshot
from ..step_times import known_or_best
from .candidates import decode_candidates, pair, prefill_candidates

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
    decodes = decode_candidates(snapshot)
    if not decodes:
        return None
    if not snapshot.view.any_prefill_alive:
        return pair(snapshot, None, _alone(snapshot, _with_room(snapshot, decodes)))
    if snapshot.view.local_prefill_itl_s is not None:
        local = local_decode(snapshot, _with_room(snapshot, decodes))
        if local is not None:
            return Placement(prefill=None, decode=local.worker)
    weighed = _weighed(snapshot, decodes)
    cheapest_s = min(decode.cost_s for decode in weighed)
    best: tuple[float, PrefillLoad, DecodeLoad] | None = None
    for prefill, least_s in _by_promise(snapshot):
        if best is not None and least_s + cheapest_s >= best[0]:
            break
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


def _by_promise(snapshot: Snapshot) -> Iterator[tuple[PrefillLoad, float]]:
    """Prefill workers, each with what going there costs at least; of those behind, none costs less than that."""
    loads, cached = prefill_candidates(snapshot), snapshot.cached_tokens
    if not isinstance(loads, PrefillLoads):
        yield from ((load, 0.0) for load in loads)
        return
    if not loads:
        return
    for worker in cached:
        if (load := loads.get(worker)) is not None:
            yield load, 0.0
    prompt_s = (1 + PREFILL_WEIGHT) * snapshot.request.num_tokens / loads.fastest
    yield from ((load, load.wait_s + prompt_s) for load in loads.by_rank() if load.worker not in cached)


def _with_room(snapshot: Snapshot, decodes: Sequence[DecodeLoad]) -> Sequence[DecodeLoad]:
    """Those that have the blocks; all if nobody has, for blocks may be freed before the request gets there."""
    return [load for load in decodes if _has_room(snapshot, load)] or decodes


def _has_room(snapshot: Snapshot, load: DecodeLoad) -> bool:
    return blocks_for(snapshot.uncached_tokens(load.worker), load.block_size) <= load.available_blocks


def _weighed(snapshot: Snapshot, decodes: Sequence[DecodeLoad]) -> Sequence[_Decode]:
    """Those that may be the best of a pair: one, where every link is the same."""
    num_tokens = snapshot.request.num_tokens
    if isinstance(decodes, DecodeLoads) and not decodes.num_placed and (best := _cheapest(snapshot, decodes)):
        return [best]
    decodes = _with_room(snapshot, decodes)
    steps_s = [joined_step_s(load, num_tokens) for load in decodes]
    # As a free one, a worker that has not decoded yet would draw everybody.
    unknown_s = min(filter(None, steps_s), default=0.0)
    weighed = [_weigh(snapshot, load, step_s or unknown_s) for load, step_s in zip(decodes, steps_s, strict=True)]
    if all(load.place is None for load in decodes):
        return [min(weighed, key=_rank)]
    return weighed


def _cheapest(snapshot: Snapshot, decodes: DecodeLoads) -> _Decode | None:
    """Of those with room, by the rank of the loads; None: nobody has, or how long somebody's step takes is unknown."""
    best: _Decode | None = None
    for load in decodes.by_rank():
        if best is not None and least_cost_s(load) > best.cost_s:
            break
        if not _has_room(snapshot, load):
            continue
        step_s = joined_step_s(load, snapshot.request.num_tokens)
        if not step_s:
            return None
        decode = _weigh(snapshot, load, step_s)
        if best is None or _rank(decode) < _rank(best):
            best = decode
    return best


def _rank(decode: _Decode) -> tuple[float, int]:
    return decode.cost_s, decode.load.num_sequences


def _weigh(snapshot: Snapshot, load: DecodeLoad, step_s: float) -> _Decode:
    moved = snapshot.uncached_tokens(load.worker)
    return _Decode(
        load=load,
        cost_s=decode_cost_s(load, step_s, blocks_for(moved, load.block_size)),
        moved_bytes=moved * snapshot.view.kv_bytes_per_token,
    )


def _alone(snapshot: Snapshot, decodes: Sequence[DecodeLoad]) -> DecodeLoad:
    """The worker that computes the prompt and answers by itself; one that has not decoded yet is taken to do it as the
    best of the others."""
    num_tokens = snapshot.request.num_tokens
    uncached = [load.local_prefill_tokens + snapshot.uncached_tokens(load.worker) for load in decodes]
    tokens_s = known_or_best([load.compute_s(number) / number for load, number in zip(decodes, uncached, strict=True)])
    steps_s = [joined_step_s(load, num_tokens) for load in decodes]
    best_step_s = min(filter(None, steps_s), default=0.0)

    def rank(index: int) -> tuple[float, int]:
        cost_s, num_sequences = _rank(_weigh(snapshot, decodes[index], steps_s[index] or best_step_s))
        return (1 + PREFILL_WEIGHT) * uncached[index] * tokens_s[index] + cost_s, num_sequences

    return decodes[min(range(len(decodes)), key=rank)]
