"""What the router lets in, and what it says to the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from splitserve.core.errors import InvalidRequest, ModelNotFound, Overloaded, PromptTooLong
from splitserve.core.request import Request, SamplingParams
from splitserve.scheduling.admission import (
    MAX_RETRY_AFTER_S,
    MIN_RETRY_AFTER_S,
    Admission,
    AdmissionPolicy,
    ModelLimits,
    check_model,
    make_request,
)
from splitserve.scheduling.fair_queue import FairQueue, Ticket
from splitserve.scheduling.routing import PrefillLoad

LIMITS = ModelLimits(max_model_len=64, vocab_size=100, eos_token_ids=frozenset({2}))


def make(**changes: Any) -> Request:
    fields: dict[str, Any] = {"request_id": "r", "prompt_token_ids": [1, 5], "limits": LIMITS, "timeout_s": 1.0}
    return make_request(**{**fields, "sampling": SamplingParams(), **changes})


def test_the_last_place_is_given_and_the_next_request_is_refused() -> None:
    admission = Admission(max_queued=2, max_live=5)
    admission.check(num_queued=1, num_live=4)
    with pytest.raises(Overloaded, match="wait for a worker"):
        admission.check(num_queued=2, num_live=4)
    with pytest.raises(Overloaded, match="are live"):
        admission.check(num_queued=1, num_live=5)


def test_retry_after_follows_the_pace_of_leaving_within_bounds() -> None:
    admission = Admission(max_queued=1, max_live=1)
    assert admission.retry_after_s(10) == MIN_RETRY_AFTER_S
    for second in range(400):
        admission.left(0.5 * second, arrived_at=0.0)
    assert admission.retry_after_s(10) == pytest.approx(5.0, rel=0.01)
    assert admission.retry_after_s(10_000) == MAX_RETRY_AFTER_S


def test_a_quiet_night_does_not_slow_the_pace_of_leaving() -> None:
    admission = Admission(max_queued=1, max_live=1)
    for number in range(100):
        admission.left(0.1 * number, arrived_at=0.1 * number - 1.0)
    morning = 8 * 3600.0
    admission.left(morning, arrived_at=morning - 1.0)
    assert admission.retry_after_s(1) < 1.0


def test_a_refusal_says_when_to_come_back() -> None:
    with pytest.raises(Overloaded) as caught:
        Admission(max_queued=0, max_live=1).check(num_queued=0, num_live=0)
    assert caught.value.retry_after_s == MIN_RETRY_AFTER_S


def test_an_unknown_model_is_told_with_what_is_served() -> None:
    check_model("", ["a"])
    check_model("a", ["a"])
    with pytest.raises(ModelNotFound, match=r"'b' is not served here; served: a"):
        check_model("b", ["a"])


def test_max_tokens_defaults_to_the_room_that_is_left() -> None:
    assert make().max_tokens == 62


def test_eos_stops_unless_ignored_and_named_stops_always_do() -> None:
    assert make(stop_token_ids=[7]).stop_token_ids == {2, 7}
    assert make(stop_token_ids=[7], ignore_eos=True).stop_token_ids == {7}


@pytest.mark.parametrize(
    ("changes", "error", "field"),
    [
        ({"prompt_token_ids": []}, InvalidRequest, "prompt"),
        ({"prompt_token_ids": [1] * 64}, PromptTooLong, "prompt"),
        ({"max_tokens": 63}, PromptTooLong, "max_tokens"),
        ({"max_tokens": 0}, InvalidRequest, "max_tokens"),
        ({"output_token_ids": [100]}, InvalidRequest, "received_token_ids"),
        ({"stop_token_ids": [100]}, InvalidRequest, "stop_token_ids"),
        ({"output_token_ids": [3, 4], "max_tokens": 1}, InvalidRequest, "received_token_ids"),
    ],
)
def test_what_the_model_cannot_serve_is_refused_by_field(
    changes: dict[str, Any], error: type[InvalidRequest], field: str
) -> None:
    with pytest.raises(error) as caught:
        make(**changes)
    assert (type(caught.value), caught.value.field) == (error, field)


def ticket(at: float = 0.0, cost: int = 100) -> Ticket:
    return Ticket(order=10**6, arrived_at=at, cost=cost)


def queue_of(num_tokens: int) -> FairQueue[str]:
    queue: FairQueue[str] = FairQueue(10.0)
    queue.push(Ticket(order=0, arrived_at=0.0, cost=num_tokens), "ahead")
    return queue


BUSY = PrefillLoad(worker="p", outstanding_tokens=500, outstanding_prompts=1, tokens_per_s=1_000.0)
IDLE = PrefillLoad(worker="p", outstanding_tokens=0, outstanding_prompts=0, tokens_per_s=1_000.0)


def slo_admission(ttft_target_s: float | None = 1.0, policy: AdmissionPolicy = "refuse") -> Admission:
    return Admission(max_queued=9, max_live=99, policy=policy, ttft_target_s=ttft_target_s)


def admit(admission: Admission, queue: FairQueue[str], load: PrefillLoad, deadline_at: float = 600.0) -> float | None:
    return admission.admit(ticket(), deadline_at=deadline_at, queue=queue, num_live=1, prefills=[load])


def test_a_first_token_that_would_come_too_late_is_refused_at_once_with_when_to_come_back() -> None:
    assert admit(slo_admission(), queue_of(300), BUSY) == pytest.approx(0.9)
    with pytest.raises(Overloaded, match=r"after about 2.6 s, the target is 1 s") as caught:
        admit(slo_admission(), queue_of(2_000), BUSY)
    assert caught.value.retry_after_s == pytest.approx(1.6)


def test_a_deadline_counts_as_a_target_does() -> None:
    assert admit(slo_admission(None), queue_of(2_000), BUSY) == pytest.approx(2.6)
    with pytest.raises(Overloaded, match="its deadline is 2 s"):
        admit(slo_admission(None), queue_of(2_000), BUSY, deadline_at=2.0)


def test_by_the_policy_queue_nothing_is_refused_but_what_there_is_no_room_for() -> None:
    assert admit(slo_admission(policy="queue"), queue_of(2_000), BUSY) == pytest.approx(2.6)
    with pytest.raises(Overloaded, match="wait for a worker"):
        admit(Admission(max_queued=1, max_live=9, policy="queue"), queue_of(1), BUSY)


def test_an_idle_cluster_refuses_nobody_however_slow_it_was_last_time() -> None:
    """Otherwise one slow step, measured at a cold start, would keep everybody out for ever."""
    slow = replace(IDLE, tokens_per_s=1.0)
    assert admit(slo_admission(), FairQueue(10.0), slow) == pytest.approx(100.0)
    slo_admission().check_start(ticket(), now=0.5, deadline_at=600.0, prefills=[slow])


def test_past_errors_are_allowed_for_and_never_shut_everybody_out() -> None:
    admission = slo_admission()
    for _ in range(200):
        admission.ttft.measured(0.5, 3.0)
    assert admission.ttft.margin_s > 1.0
    assert admit(admission, queue_of(0), replace(BUSY, outstanding_tokens=100)) == pytest.approx(0.2)
    with pytest.raises(Overloaded):
        admit(admission, queue_of(300), BUSY)


def test_who_waited_longer_than_foreseen_is_told_before_its_work_is_done_for_nothing() -> None:
    admission = slo_admission()
    admission.check_start(ticket(), now=0.3, deadline_at=600.0, prefills=[BUSY])
    with pytest.raises(Overloaded):
        admission.check_start(ticket(), now=0.5, deadline_at=600.0, prefills=[BUSY])
    assert admission.latest_start(ticket(at=5.0), deadline_at=600.0, prefills=[BUSY]) == pytest.approx(5.9)
    assert admission.latest_start(ticket(cost=0), deadline_at=600.0, prefills=[BUSY]) == pytest.approx(0.98)
    assert admission.too_late(3).retryable
