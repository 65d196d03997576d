"""Runs of decode steps take the time of their steps."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from splitserve.planner.decode_timing import RunTiming, time_run

from .clusters import LinearLatency


class KneeLatency(LinearLatency):
    """Steps cost nothing more until the context reaches 10,000 tokens."""

    def decode_step_s(self, batch: int, context_tokens: int) -> float:
        return 0.010 + 1e-6 * max(0, context_tokens - 10_000)


def step_by_step(latency: LinearLatency, num_steps: int, batch: int, context_tokens: int) -> float:
    return math.fsum(latency.decode_step_s(batch, context_tokens + index * batch) for index in range(num_steps))


@given(
    st.floats(1e-4, 0.1), st.floats(0, 1e-3), st.integers(1, 400), st.floats(0, 1), st.booleans()
)  # a step, its growth, steps, and where in the run
def test_steps_within_are_those_that_ended(
    first_s: float, growth_s: float, num_steps: int, share: float, at_a_boundary: bool
) -> None:
    timing = RunTiming(num_steps=num_steps, first_step_s=first_s, growth_s=growth_s)
    elapsed_s = timing.total_s * share
    if at_a_boundary:
        elapsed_s = timing.elapsed_s(int(num_steps * share))
    ended = timing.steps_within(elapsed_s)
    assert 0 <= ended < num_steps
    assert timing.elapsed_s(ended) <= elapsed_s
    assert ended == num_steps - 1 or timing.elapsed_s(ended + 1) > elapsed_s


def test_a_straight_model_is_summed_exactly() -> None:
    latency = LinearLatency(step_s=0.004, decode_sequence_s=2e-5, decode_context_s=3e-8)
    timing = time_run(latency, num_steps=500, batch=37, context_tokens=40_000)
    assert timing.num_steps == 500
    assert timing.total_s == pytest.approx(step_by_step(latency, 500, 37, 40_000), rel=1e-12)


@pytest.mark.parametrize("context_tokens", [1_000, 5_000, 9_990, 20_000])
def test_a_run_ends_before_the_model_bends(context_tokens: int) -> None:
    latency = KneeLatency()
    total_s, done, num_runs = 0.0, 0, 0
    while done < 1000:
        timing = time_run(latency, num_steps=1000 - done, batch=16, context_tokens=context_tokens + done * 16)
        total_s += timing.total_s
        done += timing.num_steps
        num_runs += 1
    assert total_s == pytest.approx(step_by_step(latency, 1000, 16, context_tokens), rel=2e-3)
    assert num_runs < 12


def test_steps_that_take_no_time_all_end_at_once() -> None:
    timing = time_run(LinearLatency(), num_steps=9, batch=1, context_tokens=1)
    assert timing.total_s == 0.0
    assert timing.steps_within(0.0) == 8


def test_the_model_is_asked_a_few_times_however_long_the_run() -> None:
    asked: list[int] = []

    class Counted(LinearLatency):
        def decode_step_s(self, batch: int, context_tokens: int) -> float:
            asked.append(context_tokens)
            return super().decode_step_s(batch, context_tokens)

        def prefill_step_s(self, chunks: Sequence[tuple[int, int]]) -> float:
            raise AssertionError("a run has no prefill")

    time_run(Counted(step_s=0.01, decode_context_s=1e-7), num_steps=100_000, batch=8, context_tokens=100)
    assert len(asked) == 3
