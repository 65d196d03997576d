"""Predicted times to the first token: against queues whose waits can be worked out by hand."""

from __future__ import annotations

import random

import pytest
from splitserve.scheduling.routing import PrefillLoad
from splitserve.scheduling.ttft import TtftPredictor, start_wait_s


def load(outstanding: int = 0, tokens_per_s: float = 1_000.0) -> PrefillLoad:
    return PrefillLoad(
        worker="w", outstanding_tokens=outstanding, outstanding_prompts=outstanding > 0, tokens_per_s=tokens_per_s
    )


@pytest.mark.parametrize(
    ("loads", "tokens_ahead", "wait_s"),
    [
        ([load()], 0, 0.0),
        ([load(500)], 0, 0.5),
        ([load(500)], 1_000, 1.5),
        ([load(500), load(3_000)], 1_000, 1.5),  # the second joins too late to help
        ([load(500), load(1_000)], 1_500, 1.5),  # 500 by the first alone until 1.0, then 1,000 by both
        ([load(0, 3_000.0), load(0, 1_000.0)], 4_000, 1.0),
    ],
)
def test_workers_run_down_their_backlog_and_then_the_queue(
    loads: list[PrefillLoad], tokens_ahead: float, wait_s: float
) -> None:
    assert start_wait_s(loads, tokens_ahead) == pytest.approx(wait_s)


def test_nothing_is_predicted_before_a_worker_has_told_its_speed() -> None:
    predictor = TtftPredictor()
    assert predictor.predict([load(tokens_per_s=0.0)], 0, 10) is None
    assert predictor.predict([load(tokens_per_s=0.0), load(100)], 0, 10) == pytest.approx(0.11)


def test_a_queue_that_moves_slower_than_prefill_is_predicted_by_its_pace() -> None:
    """The bottleneck is elsewhere: a decode worker lets in one request each two seconds."""
    predictor = TtftPredictor()
    for number in range(20):
        predictor.dispatched(2.0 * number, 100, num_queued=5)
    assert predictor.predict([load()], 300, 100) == pytest.approx(3 * 2.0 + 0.1)


def test_pauses_with_an_empty_queue_say_nothing_about_its_pace() -> None:
    predictor = TtftPredictor()
    for number in range(20):
        predictor.dispatched(100.0 * number, 100, num_queued=0)
    assert predictor.predict([load()], 300, 100) == pytest.approx(0.4)


def test_a_pause_behind_a_queue_that_was_left_by_other_ways_says_nothing_about_its_pace() -> None:
    """Who waited behind the last one was cancelled; an hour later that was learnt as the pace, and nobody let in."""
    predictor = TtftPredictor()
    predictor.dispatched(0.0, 100, num_queued=1)
    predictor.emptied()
    predictor.dispatched(3_600.0, 100, num_queued=1)
    assert predictor.predict([load()], 300, 100) == pytest.approx(0.4)


def test_the_pace_of_a_queue_that_is_over_is_that_of_no_other() -> None:
    predictor = TtftPredictor()
    for number in range(20):
        predictor.dispatched(2.0 * number, 100, num_queued=19 - number)
    assert predictor.predict([load()], 300, 100) == pytest.approx(0.4)


def test_the_margin_settles_where_one_error_in_ten_exceeds_it() -> None:
    predictor, rng = TtftPredictor(), random.Random(0)
    exceeded = 0
    for number in range(4_000):
        error_s = rng.gauss(0.2, 0.1)
        if number >= 1_000:
            exceeded += error_s > predictor.margin_s
        predictor.measured(1.0, 1.0 + error_s)
    assert exceeded / 3_000 == pytest.approx(0.1, abs=0.02)
