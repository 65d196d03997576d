"""Block tables: what the prefix cache serves, what a reservation takes, and what a held sequence keeps."""

import pytest
from splitserve.core.errors import InvalidRequest, Overloaded
from splitserve.core.request import FinishReason
from splitserve.scheduling.sequence import SequenceState

from .step_schedulers import END, assert_conserved, make_request, make_scheduler, run_all, run_step


def test_prompt_logprobs_are_computed_although_the_cache_holds_the_prompt() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 40))
    run_all(scheduler)
    scheduler.add(make_request("b", 40, prompt_logprobs=1))
    plan = scheduler.schedule()
    assert plan is not None
    assert [(part.start, part.end) for part in plan.parts] == [(0, 40)]
    assert plan.parts[0].prompt_targets == range(1, 40)
    assert_conserved(scheduler)


def test_the_prefix_cache_serves_whole_blocks_and_leaves_one_token_to_compute() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 48))
    run_all(scheduler)
    scheduler.add(make_request("b", 48))
    plan = scheduler.schedule()
    assert plan is not None
    assert (plan.parts[0].start, plan.parts[0].end) == (32, 48)
    assert scheduler.cached_tokens == 32


def test_the_prefix_cache_does_not_cross_tenants() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 48, tenant="x"))
    run_all(scheduler)
    scheduler.add(make_request("b", 48, tenant="y"))
    run_all(scheduler)
    assert scheduler.cached_tokens == 0


def test_a_reservation_takes_prompt_and_headroom_and_decodes_without_prefill() -> None:
    scheduler = make_scheduler()
    sequence = scheduler.reserve(make_request("a", 20, max_tokens=100), headroom_tokens=30)
    assert len(sequence.block_table) == 4  # 50 tokens
    assert scheduler.blocks.counts().granted == 4
    scheduler.start_reserved("a", 1)
    plan, tokens = run_step(scheduler)
    assert plan is not None
    assert (plan.num_decode_tokens, plan.num_prefill_tokens) == (1, 0)
    assert tokens[0].index == 1
    assert scheduler.blocks.counts().granted == 0


def test_a_reservation_pins_what_the_cache_holds() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 48))
    run_all(scheduler)
    sequence = scheduler.reserve(make_request("b", 48), headroom_tokens=0)
    assert sequence.num_cached == 32
    assert scheduler.blocks.counts().granted == 3


def test_kv_that_lost_precision_on_the_way_never_serves_a_request_that_asked_for_none() -> None:
    scheduler = make_scheduler()
    scheduler.reserve(make_request("a", 48, max_tokens=20), headroom_tokens=8, kv_history="int8")
    scheduler.start_reserved("a", 1)
    run_all(scheduler)  # publishes the prompt's blocks and those that decode filled
    cached = {}
    for history in ("int8", "none", "fp8", "bfloat16"):
        sequence = scheduler.reserve(make_request(history, 48), headroom_tokens=0, kv_history=history)
        cached[history] = sequence.num_cached
        scheduler.release(history)
    assert cached == {"int8": 32, "none": 0, "fp8": 0, "bfloat16": 0}
    scheduler.add(make_request("local", 48))
    run_step(scheduler)
    assert scheduler.get("local").num_cached == 0


def test_a_reservation_that_does_not_fit_takes_nothing() -> None:
    scheduler = make_scheduler(4)
    scheduler.reserve(make_request("a", 40, seed=1), headroom_tokens=0)
    before = scheduler.blocks.counts()
    with pytest.raises(Overloaded, match="needs 2 KV blocks, 1 can be had"):
        scheduler.reserve(make_request("b", 20, seed=2), headroom_tokens=8)
    assert scheduler.blocks.counts() == before
    scheduler.release("a")
    assert scheduler.blocks.counts().free == 4


def test_a_first_token_that_ends_the_request_is_not_started() -> None:
    scheduler = make_scheduler()
    scheduler.reserve(make_request("a", stop_token_ids=frozenset({END})), headroom_tokens=0)
    with pytest.raises(InvalidRequest):
        scheduler.start_reserved("a", END)
    with pytest.raises(InvalidRequest):
        scheduler.start_reserved("unknown", 1)
    assert scheduler.release("a")
    assert_conserved(scheduler)


def test_a_prefill_only_sequence_is_held_until_it_is_released() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", max_tokens=1), prefill_only=True)
    assert run_step(scheduler)[1][0].finish_reason is FinishReason.LENGTH
    assert run_step(scheduler)[0] is None
    assert scheduler.num_in(SequenceState.HELD) == 1
    assert scheduler.blocks.counts().live == 2
    assert scheduler.release("a")
    assert not scheduler.release("a")
    assert scheduler.blocks.counts().live == 0
