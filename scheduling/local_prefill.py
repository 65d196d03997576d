"""Conditional disaggregation: which decode worker computes a short prompt by itself, without a transfer.

Its running sequences wait for the steps in which it does. So the length up to which this is right is no constant: it
follows from what such a step is predicted to take, beside the batch that the worker has.
"""

from __future__ import annotations

from collections.abc import Sequence

from .routing import DecodeLoad, Snapshot


def local_decode(snapshot: Snapshot, decodes: Sequence[DecodeLoad]) -> DecodeLoad | None:
    """The decode worker that computes this prompt soonest in one step within the ITL limit.

    None: the prompt goes to a prefill worker, since no step would be short enough, or its first token would be later
    than a pair's by more than that limit.
    """
    limit_s = snapshot.view.local_prefill_itl_s
    if limit_s is None:
        return None
    soonest_s = min(
        (
            snapshot.wait_s(load) + load.compute_s(snapshot.uncached_tokens(load.worker))
            for load in snapshot.view.prefills
            if load.is_open(snapshot.view.prefill_bound_s)
        ),
        default=float("inf"),
    )
    best: tuple[float, DecodeLoad] | None = None
    for load in decodes:
        step_s = local_step_s(snapshot, load)
        if step_s is None or step_s > limit_s:
            continue
        running_s = load.times.decode_step_s(load.num_sequences, load.context_tokens) if load.times is not None else 0.0
        if running_s + step_s > soonest_s + limit_s:
            continue
        if best is None or step_s < best[0]:
            best = step_s, load
    return best[1] if best is not None else None


def local_step_s(snapshot: Snapshot, load: DecodeLoad) -> float | None:
    """The step that computes the prompt, and those already waiting there, beside the running batch.

    None: it computes no prompts, or nobody knows how long that takes.
    """
    if load.times is None or not (load.prefills_locally or load.colocated):
        return None
    cached = snapshot.cached_tokens.get(load.worker, 0)
    chunks = [(snapshot.uncached_tokens(load.worker), cached)]
    if load.local_prefill_tokens:
        chunks.append((load.local_prefill_tokens, 0))
    return load.times.mixed_step_s(chunks, load.num_sequences, load.context_tokens)
