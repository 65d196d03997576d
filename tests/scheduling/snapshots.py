"""Snapshots for tests of routing, with everything that a test does not name left ordinary."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from splitserve.scheduling.links import Place
from splitserve.scheduling.routing import ClusterView, DecodeLoad, PrefillLoad, RoutedRequest, Snapshot
from splitserve.scheduling.step_times import StepTimes


def prefill(
    worker: str, tokens: int = 0, *, prompts: int | None = None, speed: float = 10_000.0, place: Place | None = None
) -> PrefillLoad:
    """With so many tokens outstanding, by default in as many prompts as keep it closed past the bound."""
    return PrefillLoad(
        worker=worker,
        outstanding_tokens=tokens,
        outstanding_prompts=(2 if tokens else 0) if prompts is None else prompts,
        tokens_per_s=speed,
        place=place,
    )


def decode(
    worker: str,
    available: int = 500,
    *,
    sequences: int = 4,
    colocated: bool = False,
    prefills_locally: bool = False,
    times: StepTimes | None = None,
    local_tokens: int = 0,
    place: Place | None = None,
) -> DecodeLoad:
    """Of 1,000 blocks of 16 tokens."""
    return DecodeLoad(
        worker=worker,
        available_blocks=available,
        num_sequences=sequences,
        num_blocks=1000,
        local_prefill_tokens=local_tokens,
        times=times,
        colocated=colocated,
        prefills_locally=prefills_locally,
        place=place,
    )


def snapshot(
    prefills: Sequence[PrefillLoad],
    decodes: Sequence[DecodeLoad],
    *,
    num_tokens: int = 1000,
    turn: int = 0,
    draw: int = 0,
    session: bytes = b"",
    slack_s: float | None = None,
    alive: bool = True,
    bound_s: float = 0.2,
    cached: Mapping[str, int] | None = None,
    held: Mapping[str, int] | None = None,
    avoid: Collection[str] = (),
    kv_bytes_per_token: float = 131_072.0,
    local_prefill_itl_s: float | None = None,
) -> Snapshot:
    return Snapshot(
        request=RoutedRequest(num_tokens=num_tokens, turn=turn, draw=draw, session=session, ttft_slack_s=slack_s),
        view=ClusterView(
            prefills=prefills,
            decodes=decodes,
            any_prefill_alive=alive,
            prefill_bound_s=bound_s,
            kv_bytes_per_token=kv_bytes_per_token,
            local_prefill_itl_s=local_prefill_itl_s,
        ),
        cached_tokens=cached or {},
        held_tokens=held or {},
        avoid=avoid,
    )
