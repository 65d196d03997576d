"""Preemption: whom it may take, and that everybody comes back."""

import pytest
from splitserve.core.errors import Overloaded

from .step_schedulers import assert_conserved, make_request, make_scheduler, plan_ahead, run_all, run_step


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preempted_sequences_finish_and_emit_each_token_once(prefix_cache: bool) -> None:
    scheduler = make_scheduler(6, prefix_cache=prefix_cache)
    for i in range(4):
        scheduler.add(make_request(str(i), 20, max_tokens=40, seed=i))
    assert run_all(scheduler) == {str(i): list(range(40)) for i in range(4)}
    assert scheduler.num_preemptions > 0
    assert_conserved(scheduler)


def test_the_first_in_the_queue_is_never_preempted() -> None:
    scheduler = make_scheduler(6)
    for i in range(4):
        scheduler.add(make_request(str(i), 20, max_tokens=40, seed=i))
    while scheduler.has_work:
        oldest = min((s for s in scheduler._sequences.values()), key=lambda s: s.queue_key)
        plan, _ = run_step(scheduler)
        assert plan is not None
        assert oldest not in plan.preempted


def test_nobody_is_preempted_while_a_step_runs() -> None:
    scheduler = make_scheduler(4, prefix_cache=False)
    scheduler.add(make_request("a", 30, seed=1, max_tokens=30))
    scheduler.add(make_request("b", 30, seed=2, max_tokens=30))
    for _ in range(2):
        run_step(scheduler)  # 31 tokens of KV each: the next token but one needs a block
    first, second = plan_ahead(scheduler)
    assert len(first.parts) == 2
    assert second is None
    scheduler.commit({"a": 1, "b": 1})
    after = scheduler.schedule()
    assert after is not None
    assert [sequence.request_id for sequence in after.preempted] == ["b"]


def test_reservations_wait_behind_a_preempted_sequence() -> None:
    scheduler = make_scheduler(5)
    for name, num_tokens in (("a", 31), ("b", 31)):
        scheduler.reserve(make_request(name, num_tokens, max_tokens=40, seed=ord(name)), headroom_tokens=1)
        scheduler.start_reserved(name, 1)
    while not scheduler.num_preemptions:
        run_step(scheduler)
    with pytest.raises(Overloaded, match="arrived before"):
        scheduler.reserve(make_request("c", 10, seed=3), headroom_tokens=0)
    run_all(scheduler)
    scheduler.reserve(make_request("c", 10, seed=3), headroom_tokens=0)


@pytest.mark.parametrize("by_transfer", [True, False])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preempted_sequences_come_back_under_pressure_that_never_ends(by_transfer: bool, prefix_cache: bool) -> None:
    """More important requests are at the door before every step, and take whatever they are given."""
    scheduler = make_scheduler(8, prefix_cache=prefix_cache, max_waiting=4)
    patient = [make_request(f"patient {i}", 20, max_tokens=60, seed=i) for i in range(3)]
    for request in patient:
        scheduler.add(request)
    finished: set[str] = set()
    preempted: set[str] = set()
    for number in range(2_000):
        pushy = make_request(f"pushy {number}", 16, max_tokens=30, seed=100 + number, priority=9)
        try:
            if by_transfer:
                scheduler.reserve(pushy, headroom_tokens=8)
                scheduler.start_reserved(pushy.request_id, 1)
            else:
                scheduler.add(pushy)
        except Overloaded:
            pass
        plan, tokens = run_step(scheduler)
        assert plan is not None
        preempted |= {sequence.request_id for sequence in plan.preempted}
        finished |= {token.sequence.request_id for token in tokens if token.finish_reason is not None}
        assert_conserved(scheduler)
        if finished >= {request.request_id for request in patient}:
            break
    assert finished >= {request.request_id for request in patient}
    assert preempted & {request.request_id for request in patient}
    assert len(finished) > 3  # the important ones were served meanwhile


def test_room_that_a_sequence_gave_up_is_used_at_once() -> None:
    """No plan means that nothing can go on: whoever runs the steps sleeps then until somebody wakes it."""
    scheduler = make_scheduler(6)
    for name, max_tokens in (("a", 1), ("b", 40)):  # the same prompt twice in one step, of which the cache keeps one
        scheduler.add(make_request(name, 32, max_tokens=max_tokens))
    run_step(scheduler)
    scheduler.reserve(make_request("c", 33), headroom_tokens=8)  # pins what "a" left in the cache
    scheduler.reserve(make_request("d", 16, seed=1), headroom_tokens=0)
    plan, tokens = run_step(scheduler)  # "b" has no block for its next token: it gives two up, and needs one more
    assert plan is not None
    assert [sequence.request_id for sequence in plan.preempted] == ["b"]
    assert [sequence.request_id for sequence in plan.resumed] == ["b"]
    assert [(token.sequence.request_id, token.index) for token in tokens] == [("b", 1)]
    assert_conserved(scheduler)
