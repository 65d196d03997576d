"""Loads in order while they change, and the policy that reads them so."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from splitserve.scheduling.decode_cost import least_cost_s
from splitserve.scheduling.links import Place
from splitserve.scheduling.policies.prefix import prefix
from splitserve.scheduling.ranked_loads import DecodeLoads, PrefillLoads
from splitserve.scheduling.routing import DecodeLoad, PrefillLoad
from splitserve.scheduling.step_times import MeasuredTimes

from .snapshots import decode, prefill, snapshot

BOUND_S = 0.2
names = st.sampled_from("abcde")
# Of values that do not make equal scores of unequal workers.
prefills = st.builds(
    lambda worker, tokens, prompts, speed: prefill(worker, tokens, prompts=prompts, speed=speed),
    names,
    st.integers(0, 5_000),
    st.integers(0, 3),
    st.one_of(st.just(0.0), st.floats(5_000, 20_000)),
)


@st.composite
def decodes(draw: st.DrawFn) -> DecodeLoad:
    place = Place(host=draw(st.sampled_from("xy"))) if draw(st.booleans()) else None
    times = MeasuredTimes(
        prefill_tokens_per_s=10_000.0,
        decode_step_time_s=draw(st.one_of(st.just(0.0), st.floats(0.001, 0.1))),
        decode_batch=draw(st.integers(0, 50)),
    )
    available, sequences = draw(st.integers(0, 1_000)), draw(st.integers(0, 50))
    return decode(draw(names), available, sequences=sequences, times=times, place=place)


@given(st.lists(st.tuples(names, st.one_of(st.none(), prefills)), max_size=40))
def test_loads_stay_in_both_orders_and_who_is_open_is_known(changes: Sequence[tuple[str, PrefillLoad | None]]) -> None:
    loads, order, now = PrefillLoads(BOUND_S), list[str](), dict[str, PrefillLoad]()
    for worker, load in changes:
        before = loads.num_improvements
        loads.put(worker, load)
        old = now.pop(worker, None)
        if load is not None:
            now[worker] = load
            if worker not in order:
                order.append(worker)
            if load.is_open(BOUND_S) and (old is None or not old.is_open(BOUND_S) or load.wait_s < old.wait_s):
                assert loads.last_improvement == loads.num_improvements == before + 1
        here = [now[worker] for worker in order if worker in now]
        assert list(loads) == [loads[i] for i in range(len(loads))] == loads[:] == here
        assert list(loads.by_rank()) == sorted(here, key=lambda load: load.wait_s)
        assert loads.any_open == any(load.is_open(BOUND_S) for load in here)
        assert (loads.last_improvement > 0) == loads.any_open
        assert not here or loads.fastest == max(load.speed for load in here)


@given(
    st.lists(prefills, max_size=5, unique_by=lambda load: load.worker),
    st.lists(decodes(), max_size=5, unique_by=lambda load: load.worker),
    st.integers(1, 9_000),
    st.dictionaries(names, st.integers(1, 9_000), max_size=3),
    st.dictionaries(names, st.integers(0, 9_000), max_size=3),
    st.one_of(st.none(), st.floats(-1, 2)),
)
def test_prefix_chooses_from_ranked_loads_as_from_plain_ones(
    prefills: list[PrefillLoad],
    decodes: list[DecodeLoad],
    num_tokens: int,
    cached: dict[str, int],
    held: dict[str, int],
    slack_s: float | None,
) -> None:
    ranked, ranked_decodes = PrefillLoads(BOUND_S), DecodeLoads()
    ranked.put_all({load.worker: load for load in prefills})
    ranked_decodes.put_all({load.worker: load for load in decodes})
    assert list(ranked_decodes.by_rank()) == sorted(decodes, key=least_cost_s)
    about = {"num_tokens": num_tokens, "cached": cached, "held": held, "slack_s": slack_s}
    plain = prefix(snapshot(prefills, decodes, **about))  # type: ignore[arg-type]
    assert prefix(snapshot(ranked, ranked_decodes, **about)) == plain  # type: ignore[arg-type]
