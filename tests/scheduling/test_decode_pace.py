"""How many sequences fit within a limit on the decode step."""

from __future__ import annotations

import random

import pytest
from splitserve.scheduling.decode_pace import DecodePace


def test_without_a_limit_or_a_report_there_is_room() -> None:
    assert DecodePace(None).has_room(10_000)
    assert DecodePace(0.01).has_room(10_000)


@pytest.mark.parametrize(("base_s", "sequence_s", "fits"), [(0.010, 0.0005, 40), (0.001, 0.002, 14)])
def test_the_batch_that_fits_is_found_from_smaller_ones(base_s: float, sequence_s: float, fits: int) -> None:
    pace, rng = DecodePace(0.030), random.Random(1)
    for _ in range(200):
        batch = rng.randrange(1, fits // 2)
        pace.report(batch, (base_s + sequence_s * batch) * rng.uniform(0.98, 1.02))
    most = next(batch for batch in range(1, 1_000) if not pace.has_room(batch))
    assert most == pytest.approx(fits, rel=0.15)


def test_an_idle_worker_always_has_room_and_one_past_the_limit_has_none() -> None:
    """Even a limit that no step meets lets one sequence in, or nothing would ever be measured."""
    pace = DecodePace(0.001)
    for batch in (1, 2, 3):
        pace.report(batch, 0.020)
    assert pace.has_room(0)
    assert not pace.has_room(1)


def test_steps_of_one_batch_size_are_taken_to_grow_and_not_more_than_in_proportion() -> None:
    pace = DecodePace(0.030)
    for _ in range(50):
        pace.report(10, 0.020)
    assert pace.step_s(10) == pytest.approx(0.020)
    assert 0.020 < pace.step_s(20) <= 0.040
