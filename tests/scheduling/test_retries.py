"""Retries: at once, then with growing waits, within a budget, and never for what kills workers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from splitserve.core.errors import (
    InvalidRequest,
    PoisonRequest,
    RetryBudgetSpent,
    SplitserveError,
    TransferFailed,
    WorkerDied,
    WorkerLost,
)
from splitserve.scheduling.retries import CLEARED_TOKENS, WINDOW_S, Backoff, Failures, RetryBudget, RetryRules

DIED, HUNG = WorkerDied("the process ended"), WorkerLost("no word for 3 s")


def rules(*, max_attempts: int = 100, max_deaths: int = 2, ratio: float = 0.0, floor: int = 1_000) -> RetryRules:
    budget = RetryBudget(ratio=ratio, floor=floor)
    return RetryRules(max_attempts=max_attempts, max_deaths=max_deaths, budget=budget)


def fail(
    these: RetryRules,
    failures: Failures,
    error: SplitserveError,
    *,
    boot_id: str = "boot",
    alive: tuple[str, ...] = (),
    num_tokens: int = 0,
) -> float:
    return these.delay_s(failures, error, boot_id=boot_id, alive=alive, num_tokens=num_tokens, now=0.0, num_live=0)


@given(st.floats(0, 1), st.integers(2, 40))
def test_only_the_first_retry_is_immediate_and_waits_grow_to_a_bound(jitter: float, num_failures: int) -> None:
    backoff = Backoff(initial_s=0.1, max_s=2.0)
    assert backoff.delay_s(1, jitter) == 0.0
    whole_s = min(2.0, 0.1 * 2 ** (num_failures - 2))
    assert whole_s / 2 <= backoff.delay_s(num_failures, jitter) <= whole_s
    assert backoff.delay_s(num_failures, 0.0) < backoff.delay_s(num_failures, 1.0)


@given(st.floats(0, 2), st.integers(0, 20), st.lists(st.tuples(st.floats(0, 5), st.booleans()), max_size=200))
def test_retries_of_any_minute_stay_within_its_requests_and_the_floor(
    ratio: float, floor: int, events: list[tuple[float, bool]]
) -> None:
    """A window that starts anywhere: retries in it <= floor + ratio x requests of the window and the slice before."""
    budget, now = RetryBudget(ratio=ratio, floor=floor), 100.0
    requests: list[float] = []
    retries: list[float] = []
    for wait_s, is_request in events:
        now += wait_s
        if is_request:
            budget.admitted(now)
            requests.append(now)
        else:
            recent = sum(now - WINDOW_S < at <= now for at in requests)
            spent = sum(now - WINDOW_S < at <= now for at in retries)
            if budget.spend(now, num_live=0):
                retries.append(now)
                # The oldest slice is given up whole, so a window that ends now may see some of its retries still.
                whole = sum(now - WINDOW_S * 11 / 12 < at <= now for at in retries)
                assert whole <= floor + ratio * recent
            else:
                assert spent + 1 > floor + int(ratio * sum(now - WINDOW_S * 11 / 12 < at <= now for at in requests))


def test_long_requests_count_for_the_budget_while_they_live() -> None:
    budget = RetryBudget(ratio=0.5, floor=1)
    assert budget.left(1_000.0, num_live=10) == 6
    assert [budget.spend(1_000.0, num_live=10) for _ in range(7)] == [True] * 6 + [False]
    assert budget.left(1_000.0 + WINDOW_S + WINDOW_S / 12, num_live=0) == 1  # forgotten


def test_past_the_budget_a_failure_is_typed_and_retryable() -> None:
    these = rules(floor=1)
    assert fail(these, Failures(), TransferFailed("no KV")) == 0.0
    with pytest.raises(RetryBudgetSpent, match="no KV") as caught:
        fail(these, Failures(), TransferFailed("no KV"))
    assert caught.value.retryable
    assert caught.value.retry_after_s


def test_the_last_attempts_error_and_what_no_retry_can_help_go_to_the_client() -> None:
    these, failures = rules(max_attempts=2), Failures()
    fail(these, failures, TransferFailed("first"))
    with pytest.raises(TransferFailed, match="second"):
        fail(these, failures, TransferFailed("second"))
    with pytest.raises(InvalidRequest):
        fail(rules(), Failures(), InvalidRequest("never"))


def test_a_request_under_which_two_workers_died_is_not_tried_on_a_third() -> None:
    these, failures = rules(), Failures()
    fail(these, failures, DIED, num_tokens=20)
    fail(these, failures, TransferFailed("no KV"), num_tokens=20)
    with pytest.raises(PoisonRequest) as caught:
        fail(these, failures, DIED, num_tokens=20 + CLEARED_TOKENS - 1)
    assert not caught.value.retryable


def test_hangs_transfers_and_workers_that_only_held_it_are_not_held_against_a_request() -> None:
    these, failures = rules(), Failures()
    for _ in range(5):
        fail(these, failures, HUNG)
        fail(these, failures, TransferFailed("no KV"))
        fail(these, failures, DIED, boot_id="")
    fail(these, failures, DIED)
    with pytest.raises(PoisonRequest):
        fail(these, failures, DIED)


def test_a_request_that_gets_past_the_place_of_a_death_was_not_its_cause() -> None:
    these, failures = rules(), Failures()
    for number in range(10):
        fail(these, failures, DIED, num_tokens=number * CLEARED_TOKENS)


def test_a_worker_whose_link_broke_and_came_back_did_not_die() -> None:
    these, failures = rules(), Failures()
    fail(these, failures, DIED, boot_id="one")
    fail(these, failures, DIED, boot_id="two", alive=("one",))
    with pytest.raises(PoisonRequest):
        fail(these, failures, DIED, boot_id="three")
