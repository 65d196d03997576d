"""What the router lets in, and what it says to the rest."""

from __future__ import annotations

from typing import Any

import pytest
from splitserve.core.errors import InvalidRequest, ModelNotFound, Overloaded, PromptTooLong
from splitserve.core.request import Request, SamplingParams
from splitserve.scheduling.admission import (
    MAX_RETRY_AFTER_S,
    MIN_RETRY_AFTER_S,
    Admission,
    ModelLimits,
    check_model,
    make_request,
)

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
        admission.left(0.5 * second)
    assert admission.retry_after_s(10) == pytest.approx(5.0, rel=0.01)
    assert admission.retry_after_s(10_000) == MAX_RETRY_AFTER_S


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
