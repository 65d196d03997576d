"""The step scheduler: order, chunks, steps planned ahead, and what becomes of sequences whose step ends or fails."""

import pytest
from splitserve.core.errors import InvalidRequest, Overloaded
from splitserve.core.logprobs import TokenLogprob
from splitserve.core.request import FinishReason
from splitserve.scheduling.sequence import PENDING

from .step_schedulers import END, assert_conserved, make_request, make_scheduler, plan_ahead, run_all, run_step


def test_a_long_prompt_is_prefilled_in_chunks_of_the_budget() -> None:
    scheduler = make_scheduler(max_step_tokens=24)
    scheduler.add(make_request("a", 60))
    chunks = []
    for _ in range(3):
        plan, _ = run_step(scheduler)
        assert plan is not None
        chunks.append((plan.parts[0].start, plan.parts[0].end))
    assert chunks == [(0, 24), (24, 48), (48, 60)]


def test_the_last_token_of_a_prompt_is_prefill_and_one_of_a_recompute_is_a_decode() -> None:
    scheduler = make_scheduler(max_step_tokens=24, prefix_cache=False)
    scheduler.add(make_request("a", 25))

    def tokens_of_step() -> tuple[int, int]:
        plan, _ = run_step(scheduler)
        assert plan is not None
        return plan.num_prefill_tokens, plan.num_decode_tokens

    assert [tokens_of_step() for _ in range(3)] == [(24, 0), (1, 0), (0, 1)]
    scheduler._preempt(scheduler.get("a"))  # with 27 tokens
    assert [tokens_of_step() for _ in range(3)] == [(24, 0), (3, 0), (0, 1)]
    scheduler.release("a")
    scheduler.add(make_request("b", 24))
    run_step(scheduler)
    scheduler._preempt(scheduler.get("b"))  # with 25 tokens, of which it sampled the newest
    assert [tokens_of_step() for _ in range(2)] == [(24, 0), (0, 1)]


def test_the_last_token_of_a_prompt_counts_against_the_budget() -> None:
    scheduler = make_scheduler(max_step_tokens=24, prefix_cache=False)
    scheduler.add(make_request("a", 49, seed=1))
    scheduler.add(make_request("b", 25, seed=2))
    steps = []
    for _ in range(4):
        plan, _ = run_step(scheduler)
        assert plan is not None
        assert plan.num_prefill_tokens <= 24
        steps.append([(part.sequence.request_id, part.num_tokens) for part in plan.parts])
    assert steps == [[("a", 24)], [("a", 24)], [("a", 1), ("b", 23)], [("a", 1), ("b", 2)]]


def test_no_prompt_joins_a_step_that_is_busy_enough() -> None:
    scheduler = make_scheduler(max_step_tokens=64, max_packed_tokens=20)
    for seed, (name, length) in enumerate([("a", 10), ("b", 15), ("c", 12), ("long", 50), ("d", 4)]):
        scheduler.add(make_request(name, length, max_tokens=1, seed=seed))
    steps = []
    for _ in range(3):
        plan, _ = run_step(scheduler)
        assert plan is not None
        steps.append([part.sequence.request_id for part in plan.parts])
    assert steps == [["a", "b"], ["c", "long"], ["d"]]


def test_a_step_that_is_never_busy_enough_still_ends_at_its_budget() -> None:
    scheduler = make_scheduler(max_step_tokens=24, max_packed_tokens=512)
    for seed, length in enumerate((10, 14, 12)):
        scheduler.add(make_request(str(seed), length, seed=seed))
    plan, _ = run_step(scheduler)
    assert plan is not None
    assert [part.num_tokens for part in plan.parts] == [10, 14]


def test_decodes_go_on_beside_a_prefill_and_do_not_use_its_budget() -> None:
    scheduler = make_scheduler(max_step_tokens=32)
    scheduler.add(make_request("a", 20, seed=1))
    run_step(scheduler)
    scheduler.add(make_request("b", 40, seed=2))
    plan, tokens = run_step(scheduler)
    assert plan is not None
    assert (plan.num_decode_tokens, plan.num_prefill_tokens) == (1, 32)
    assert [token.sequence.request_id for token in tokens] == ["a"]


def test_a_step_planned_ahead_decodes_the_token_that_is_not_known_yet() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 20))
    first, second = plan_ahead(scheduler)
    assert second is not None
    assert (second.parts[0].start, second.parts[0].end, second.parts[0].index) == (20, 21, 1)
    assert second.parts[0].sequence.token_ids[20:] == [PENDING, PENDING]
    assert [(t.index, t.token_id) for t in scheduler.commit({"a": 5})] == [(0, 5)]
    assert [(t.index, t.token_id) for t in scheduler.commit({"a": 6})] == [(1, 6)]
    assert first.parts[0].sequence.token_ids[20:] == [5, 6]


def test_what_was_computed_past_a_stop_token_is_dropped_and_its_blocks_wait_for_the_step() -> None:
    scheduler = make_scheduler(prefix_cache=False)
    scheduler.add(make_request("a", 20, stop_token_ids=frozenset({END})))
    plan_ahead(scheduler)
    (last,) = scheduler.commit({"a": END})
    assert last.finish_reason is FinishReason.STOP
    assert scheduler.blocks.counts().live > 0  # the second step still writes there
    assert scheduler.schedule() is None
    assert scheduler.commit({"a": 1}) == []
    assert scheduler.blocks.counts().live == 0
    assert not scheduler.has_work


def test_no_step_is_planned_past_the_last_token() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 20, max_tokens=1))
    scheduler.add(make_request("b", 20, seed=1), prefill_only=True)
    first, second = plan_ahead(scheduler)
    assert len(first.parts) == 2
    assert second is None


def test_a_step_tells_each_prompt_token_once_and_few_at_a_time() -> None:
    """Rows of logits are as long as the vocabulary, so a step has room for 256 of prompt tokens, over all sequences."""
    scheduler = make_scheduler(num_blocks=256, max_step_tokens=600)
    for number in range(3):
        scheduler.add(make_request(str(number), 300, seed=number, prompt_logprobs=0))
    scheduler.add(make_request("plain", 40, seed=4))
    targets: dict[str, list[int]] = {}
    for _ in range(6):
        plan = scheduler.schedule()
        assert plan is not None
        assert sum(len(part.prompt_targets) for part in plan.parts) <= 256
        sampled = {}
        for part in plan.parts:
            told = targets.setdefault(part.sequence.request_id, [])
            told += part.prompt_targets
            entries = [TokenLogprob(token_id=1, logprob=-1.0, rank=1) for _ in part.prompt_targets]
            part.sequence.prompt_logprobs += entries
            if part.samples:
                sampled[part.sequence.request_id] = 1
        scheduler.commit(sampled)
    assert targets == {**{str(number): list(range(1, 300)) for number in range(3)}, "plain": []}


def test_a_sequence_without_its_token_is_forgotten_and_the_others_go_on() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a"))
    scheduler.add(make_request("b", seed=1))
    scheduler.schedule()
    assert [token.sequence.request_id for token in scheduler.commit({"b": 1})] == ["b"]
    assert not scheduler.release("a")
    assert_conserved(scheduler)
    assert run_all(scheduler) == {"b": list(range(1, 8))}
    assert scheduler.blocks.counts().live == 0


def test_higher_priority_is_prefilled_first_and_equals_in_order_of_arrival() -> None:
    scheduler = make_scheduler(max_running=1)
    for name, priority in (("a", 0), ("b", 0), ("c", 5)):
        scheduler.add(make_request(name, max_tokens=1, priority=priority, seed=ord(name)))
    order = [run_step(scheduler)[1][0].sequence.request_id for _ in range(3)]
    assert order == ["c", "a", "b"]


def test_who_came_to_its_router_first_is_prefilled_first_whichever_router_brings_it_sooner() -> None:
    scheduler = make_scheduler(max_running=1)
    for name, arrived_at in (("c", 3.0), ("a", 1.0), ("d", 3.0), ("b", 2.0)):
        scheduler.add(make_request(name, max_tokens=1, seed=ord(name)), arrived_at=arrived_at)
    order = [run_step(scheduler)[1][0].sequence.request_id for _ in range(4)]
    assert order == ["a", "b", "c", "d"]


def test_stop_tokens_and_max_tokens_end_a_request() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", stop_token_ids=frozenset({END})))
    assert run_step(scheduler, END)[1][0].finish_reason is FinishReason.STOP
    scheduler.add(make_request("b", max_tokens=2))
    assert run_step(scheduler)[1][0].finish_reason is None
    assert run_step(scheduler)[1][0].finish_reason is FinishReason.LENGTH
    assert not scheduler.has_work


def test_a_resumed_request_goes_on_after_its_output() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", max_tokens=5, output_token_ids=(1, 1, 1)))
    assert run_all(scheduler) == {"a": [3, 4]}


def test_the_queue_is_bounded_and_ids_are_unique() -> None:
    scheduler = make_scheduler(max_waiting=2)
    scheduler.add(make_request("a"))
    with pytest.raises(InvalidRequest):
        scheduler.add(make_request("a"))
    scheduler.add(make_request("b"))
    with pytest.raises(Overloaded):
        scheduler.add(make_request("c"))


def test_a_release_during_a_step_frees_when_the_step_ends() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a"))
    scheduler.schedule()
    assert scheduler.release("a")
    assert scheduler.blocks.counts().live == 2
    assert scheduler.commit({"a": 1}) == []
    assert scheduler.blocks.counts().live == 0


def test_an_abandoned_step_drops_its_sequences_only() -> None:
    scheduler = make_scheduler(max_running=1)
    scheduler.add(make_request("a"))
    scheduler.add(make_request("b"))
    scheduler.schedule()
    assert [sequence.request_id for sequence in scheduler.abandon()] == ["a"]
    assert_conserved(scheduler)
    assert list(run_all(scheduler)) == ["b"]
