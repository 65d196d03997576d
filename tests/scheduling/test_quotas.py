"""What each API key may have: requests and tokens a minute, and requests at a time."""

from __future__ import annotations

import pytest
from splitserve.core.api_key import ANYBODY, ApiKey
from splitserve.core.errors import RateLimited
from splitserve.scheduling.quotas import Quotas


def allowed(quotas: Quotas, key: ApiKey, now: float, num_tokens: int = 10) -> bool:
    try:
        quotas.begin(key, num_tokens, now)
    except RateLimited:
        return False
    return True


def test_requests_flow_back_evenly_over_the_minute() -> None:
    quotas, key = Quotas(), ApiKey(name="a", max_requests_per_min=30)
    assert [allowed(quotas, key, 0.0) for _ in range(31)] == [True] * 30 + [False]
    with pytest.raises(RateLimited, match=r"'a' has made its 30 requests a minute") as caught:
        quotas.begin(key, 10, 0.5)
    assert caught.value.retry_after_s == pytest.approx(1.5)
    assert allowed(quotas, key, 2.01)
    assert not allowed(quotas, key, 2.02)
    assert sum(allowed(quotas, key, 600.0) for _ in range(100)) == 30  # a pause saves up no more than a minute


def test_tokens_of_prompts_and_of_answers_count() -> None:
    quotas, key = Quotas(), ApiKey(name="a", max_tokens_per_min=600)
    quotas.begin(key, 100, 0.0)
    quotas.end(key, 600, 0.0)  # an answer is not cut off, the next request waits for it
    with pytest.raises(RateLimited, match="600 tokens a minute") as caught:
        quotas.begin(key, 50, 0.0)
    assert caught.value.retry_after_s == pytest.approx(15.0)
    assert allowed(quotas, key, 15.01, 50)


def test_a_prompt_longer_than_a_minute_allows_waits_for_a_whole_one_and_not_for_ever() -> None:
    quotas, key = Quotas(), ApiKey(name="a", max_tokens_per_min=100)
    quotas.begin(key, 250, 0.0)
    assert not allowed(quotas, key, 149.0, 250)
    assert allowed(quotas, key, 151.0, 250)


def test_so_many_at_a_time() -> None:
    quotas, key = Quotas(), ApiKey(name="a", max_concurrent=2)
    assert [allowed(quotas, key, 0.0) for _ in range(3)] == [True, True, False]
    quotas.end(key, 5, 1.0)
    assert [allowed(quotas, key, 1.0) for _ in range(2)] == [True, False]


def test_what_was_refused_for_lack_of_room_does_not_count() -> None:
    quotas = Quotas()
    key = ApiKey(name="a", max_requests_per_min=1, max_tokens_per_min=100, max_concurrent=1)
    for _ in range(50):
        quotas.begin(key, 100, 0.0)
        quotas.take_back(key, 100, 0.0)
    assert allowed(quotas, key, 0.0, 100)


def test_keys_do_not_use_each_others_allowance_and_who_has_no_limit_has_none() -> None:
    quotas = Quotas()
    for name in "ab":
        assert allowed(quotas, ApiKey(name=name, max_requests_per_min=1), 0.0)
    for key in (ANYBODY, ApiKey(name="free")):
        assert all(allowed(quotas, key, 0.0, 10**9) for _ in range(100))


def test_keys_that_have_everything_back_are_forgotten() -> None:
    quotas = Quotas()
    for number in range(5_000):
        key = ApiKey(name=str(number), max_concurrent=1, max_tokens_per_min=10)
        quotas.begin(key, 10, float(number))
        quotas.end(key, 0, float(number))
    assert len(quotas._accounts) < 1_200


@pytest.mark.parametrize(
    "key",
    [
        ApiKey(name="a", max_concurrent=3),
        ApiKey(name="a", max_requests_per_min=3),
        ApiKey(name="a", max_tokens_per_min=30),
    ],
    ids=["concurrent", "requests", "tokens"],
)
def test_what_resumes_may_overdraw_by_as_much_again(key: ApiKey) -> None:
    quotas = Quotas()
    for _ in range(3):
        quotas.begin(key, 10, 0.0)
    assert not allowed(quotas, key, 0.0)
    for _ in range(3):
        quotas.begin(key, 10, 0.0, resumes=True)
    with pytest.raises(RateLimited):  # it is no way around the limits
        quotas.begin(key, 10, 0.0, resumes=True)


@pytest.mark.parametrize("limit", ["max_requests_per_min", "max_tokens_per_min"])
def test_a_limit_that_a_key_gets_later_begins_then(limit: str) -> None:
    quotas, before = Quotas(), ApiKey(name="a", max_concurrent=8)
    for _ in range(1_000):
        quotas.begin(before, 100, 0.0)
        quotas.end(before, 100, 0.0)
    after = ApiKey(name="a", max_concurrent=8, **{limit: 200})
    assert allowed(quotas, after, 1.0, 100)
