"""Which pair serves a request."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from splitserve.scheduling.routing import DecodeLoad, Placement, PrefillLoad, place

FAST = PrefillLoad(worker="p-fast", outstanding_tokens=100, outstanding_prompts=2, tokens_per_s=10_000.0)
SLOW = PrefillLoad(worker="p-slow", outstanding_tokens=90, outstanding_prompts=2, tokens_per_s=1_000.0)
ROOMY = DecodeLoad(worker="d-roomy", available_blocks=50, num_sequences=9)
FULL = DecodeLoad(worker="d-full", available_blocks=5, num_sequences=1)
BOTH = DecodeLoad(worker="c", available_blocks=1, num_sequences=0, colocated=True)


def choose(
    prefills: list[PrefillLoad],
    decodes: list[DecodeLoad],
    *,
    alive: bool = True,
    bound_s: float = 0.2,
    avoid: Collection[str] = (),
) -> Placement | None:
    return place(prefills, decodes, any_prefill_alive=alive, prefill_bound_s=bound_s, avoid=avoid)


def test_the_shortest_wait_and_the_most_room_win() -> None:
    assert choose([SLOW, FAST], [FULL, ROOMY]) == Placement(prefill="p-fast", decode="d-roomy")


def test_equal_room_goes_to_fewer_sequences() -> None:
    busy = DecodeLoad(worker="d-busy", available_blocks=50, num_sequences=10)
    assert choose([FAST], [busy, ROOMY]) == Placement(prefill="p-fast", decode="d-roomy")


def test_past_the_bound_the_request_stays_queued() -> None:
    assert choose([SLOW], [ROOMY], bound_s=0.08) is None
    assert choose([SLOW], [ROOMY], bound_s=0.09) == Placement(prefill="p-slow", decode="d-roomy")


def test_a_worker_that_failed_is_taken_only_without_another() -> None:
    assert choose([FAST, SLOW], [ROOMY, FULL], avoid={"p-fast", "d-roomy"}) == Placement(
        prefill="p-slow", decode="d-full"
    )
    assert choose([FAST], [ROOMY], avoid={"p-fast", "d-roomy"}) == Placement(prefill="p-fast", decode="d-roomy")


def test_without_a_living_prefill_worker_a_colocated_one_does_everything() -> None:
    assert choose([], [ROOMY, BOTH], alive=False) == Placement(prefill=None, decode="c")
    assert choose([], [ROOMY], alive=False) is None


def test_busy_prefill_workers_are_not_dead_ones() -> None:
    assert choose([], [ROOMY, BOTH], alive=True) is None


def test_a_prompt_waits_behind_the_running_one_however_long_that_is() -> None:
    running = replace(SLOW, outstanding_tokens=8_192, outstanding_prompts=1)
    assert choose([running], [ROOMY]) == Placement(prefill="p-slow", decode="d-roomy")
    assert choose([replace(running, outstanding_prompts=2)], [ROOMY]) is None
    assert choose([running], [ROOMY], bound_s=0.0) is None


loads = st.builds(
    PrefillLoad,
    worker=st.uuids().map(str),
    outstanding_tokens=st.integers(0, 5000),
    outstanding_prompts=st.integers(0, 4),
    tokens_per_s=st.floats(0, 1e5),
)


@given(st.lists(loads, max_size=6), st.floats(0.01, 2.0))
def test_no_request_is_sent_past_the_bound_but_to_a_worker_about_to_run_dry(
    prefills: list[PrefillLoad], bound_s: float
) -> None:
    usable = {p.worker: p.wait_s for p in prefills if p.wait_s <= bound_s or p.outstanding_prompts < 2}
    placed = choose(prefills, [ROOMY], bound_s=bound_s)
    if placed is None:
        assert not usable
    else:
        assert placed.prefill is not None
        assert usable[placed.prefill] == min(usable.values())
