"""Queueing formulas against theory, and what sizing does with them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve.planner.api import synthetic_requests, workers_needed
from splitserve.planner.closed_form import (
    estimate_colocated,
    estimate_decode,
    estimate_prefill,
    queue_wait,
    sojourn_percentile,
)
from splitserve.planner.latency import StepLatency
from splitserve.planner.load import Load, cached_tokens
from splitserve.planner.types import PoolSpec, SimRequest, Slo, WorkerSpec
from splitserve.scheduling.queueing import erlang_c

LATENCY = StepLatency(
    prefill_base_s=0.005,
    prefill_token_s=2e-5,
    prefill_pair_s=1e-10,
    prefill_sequence_s=0.0,
    decode_base_s=0.004,
    decode_sequence_s=2e-5,
    decode_context_s=3e-8,
)
WORKER = WorkerSpec(latency=LATENCY, num_blocks=50_000, block_size=16, max_step_tokens=8192, max_running=256)


def load(rate: float, isl: int | str = 2000, osl: int = 200) -> Load:
    return Load.of(synthetic_requests(isl=isl, osl=osl, rate=rate, num_requests=1000), prefix_cache=False)


def test_erlang_c_is_the_textbooks() -> None:
    assert erlang_c(1, 0.8) == pytest.approx(0.8)
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(10, 8.0) == pytest.approx(0.4092, abs=1e-4)


def test_waits_are_exact_where_theory_is() -> None:
    markov = queue_wait(rate=0.8, servers=1, mean_s=1.0, cv=1.0, arrival_cv=1.0)
    assert markov.mean_s == pytest.approx(0.8 / 0.2)  # M/M/1
    fixed = queue_wait(rate=0.8, servers=1, mean_s=1.0, cv=0.0, arrival_cv=1.0)
    assert fixed.mean_s == pytest.approx(0.8 / (2 * 0.2))  # M/D/1: Pollaczek and Khinchine
    several = queue_wait(rate=8.0, servers=10, mean_s=1.0, cv=1.0, arrival_cv=1.0)
    assert several.mean_s == pytest.approx(erlang_c(10, 8.0) / 2)  # M/M/c
    service = np.array([0.0])
    p99 = sojourn_percentile(markov, service, 99)
    assert markov.probability * math.exp(-markov.decay * p99) == pytest.approx(0.01)


def test_a_percentile_of_waiting_and_service_lies_between_its_parts() -> None:
    wait = queue_wait(rate=0.7, servers=1, mean_s=1.0, cv=0.5, arrival_cv=1.0)
    service = np.array([0.5, 1.0, 1.5])
    p90 = sojourn_percentile(wait, service, 90)
    assert 1.5 < p90 < 1.5 + sojourn_percentile(wait, np.array([0.0]), 90)
    assert float(wait.beyond(p90 - service).mean()) == pytest.approx(0.1, abs=1e-3)


def test_decode_meets_littles_law() -> None:
    traffic = load(20.0)
    found = estimate_decode(WORKER, 2, traffic)
    step_s = LATENCY.decode_step_s(found.batch, found.batch * traffic.resident_context)
    assert found.batch == pytest.approx(traffic.rate / 2 * (traffic.mean_osl - 1) * step_s, rel=1e-3)
    assert found.tpot_s[50.0] == pytest.approx(step_s)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.5, 30), st.integers(1, 6))
def test_more_workers_are_never_slower_and_more_load_never_faster(rate: float, count: int) -> None:
    for estimate in (
        lambda n, r: estimate_prefill(WORKER, n, load(r), 0.0).ttft_s[90.0],
        lambda n, r: estimate_decode(WORKER, n, load(r)).tpot_s[90.0],
        lambda n, r: estimate_colocated(WORKER, n, load(r), 0.0).tpot_s[90.0],
    ):
        assert estimate(count + 1, rate) <= estimate(count, rate) * 1.0001
        assert estimate(count, rate * 1.2) >= estimate(count, rate) * 0.9999


def test_saturation_is_named_and_not_a_number() -> None:
    assert estimate_prefill(WORKER, 1, load(200.0), 0.0).binding == "prefill throughput"
    assert estimate_decode(WORKER, 1, load(500.0)).binding == "decode throughput"
    tight = WorkerSpec(latency=LATENCY, num_blocks=600, block_size=16, max_step_tokens=8192, max_running=256)
    assert estimate_decode(tight, 1, load(100.0)).binding == "decode KV memory"
    tiny = WorkerSpec(latency=LATENCY, num_blocks=100, block_size=16, max_step_tokens=8192, max_running=256)
    assert "does not fit" in estimate_decode(tiny, 1, load(1.0)).binding


def test_counting_workers_for_a_controller() -> None:
    pool = PoolSpec(worker=WORKER, num_workers=1)
    slo = Slo(ttft_s=0.2, tpot_s=0.01)
    low = workers_needed(pool, pool, load(5.0), slo)
    high = workers_needed(pool, pool, load(200.0), slo)
    assert low == (1, 1)
    assert high[0] is not None
    assert high[1] is not None
    assert high[0] == 9  # 8.3 of them are busy on average
    impossible = workers_needed(pool, pool, load(5.0), Slo(ttft_s=0.001, tpot_s=0.01))
    assert impossible == (None, 1)


def test_a_load_is_the_figures_of_its_requests() -> None:
    figures = load(10.0, "3000:0.5")
    assert figures.rate == pytest.approx(10.0, rel=1e-6)
    assert figures.arrival_cv == pytest.approx(1.0, abs=0.1)
    assert figures.mean_isl == pytest.approx(3000, rel=0.06)
    assert figures.isl.std() / figures.mean_isl == pytest.approx(0.5, abs=0.07)
    longer = figures.with_prompts(2.0)
    assert longer.mean_isl == pytest.approx(2 * figures.mean_isl)
    assert longer.resident_context - figures.resident_context == pytest.approx(figures.mean_isl)


def test_shared_prefixes_count_as_cached_from_their_second_use() -> None:
    requests = [
        SimRequest(arrival_s=0.0, isl=40, osl=1, hash_ids=(1, 2, 3), hash_block_tokens=16),
        SimRequest(arrival_s=1.0, isl=40, osl=1, hash_ids=(1, 2, 9), hash_block_tokens=16),
        SimRequest(arrival_s=2.0, isl=32, osl=1, hash_ids=(1, 2), hash_block_tokens=16),
        SimRequest(arrival_s=3.0, isl=32, osl=1, hash_ids=(2, 1), hash_block_tokens=16),
    ]
    assert cached_tokens(requests) == [0.0, 32.0, 31.0, 0.0]  # the last token is always computed
