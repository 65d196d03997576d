"""Percentiles, goodput and load runs against a real gRPC router that each test scripts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import repeat

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from splitserve.client import AsyncClient, Model, Overloaded
from splitserve.client.load import (
    NO_RETRY,
    RequestRecord,
    Slo,
    distribution,
    percentile,
    run_load,
    summarize,
)
from splitserve.client.testing import ScriptedRouter, count_up, finished, started, token
from splitserve.client.workload import LoadRequest, random_workload
from splitserve.proto import inference_pb2 as pb

TINY = Model(name="tiny", max_model_len=256, vocab_size=1_000)
TIMES = st.floats(min_value=0, max_value=1e6, allow_nan=False)


def record(
    token_times_s: tuple[float, ...], *, index: int = 0, scheduled_s: float = 0.0, error: str | None = None
) -> RequestRecord:
    return RequestRecord(
        index=index,
        scheduled_s=scheduled_s,
        sent_s=scheduled_s,
        ended_s=token_times_s[-1] if token_times_s else scheduled_s,
        num_prompt_tokens=10,
        num_cached_tokens=0,
        num_output_tokens=len(token_times_s),
        token_times_s=token_times_s,
        error=error,
        message="",
        kv_bytes=0,
        transport="none",
        prefill_s=0.0,
        transfer_exposed_s=0.0,
        prefill_worker="",
        decode_worker="",
    )


@given(st.lists(TIMES, min_size=1, max_size=50), st.floats(min_value=0, max_value=100))
def test_percentile_is_numpys(values: list[float], q: float) -> None:
    assert percentile(values, q) == pytest.approx(float(numpy.percentile(values, q)), rel=1e-9, abs=1e-9)


@given(st.lists(TIMES, min_size=1, max_size=50))
def test_a_distribution_is_ordered_and_within_its_values(values: list[float]) -> None:
    found = distribution(values)
    assert found is not None
    assert min(values) <= found.p50 <= found.p90 <= found.p99 <= found.max == max(values)
    assert found.n == len(values)


def test_the_latencies_are_those_of_the_glossary() -> None:
    one = record((2.0, 2.5, 2.5, 4.0), scheduled_s=1.0)
    assert one.ttft_s == 1.0
    assert one.e2e_s == 3.0
    assert one.tpot_s == pytest.approx((3.0 - 1.0) / 3)
    assert one.itl_s == [0.5, 0.0, 1.5]
    single = record((2.0,))
    assert (single.tpot_s, single.itl_s) == (None, [])
    assert record(()).ttft_s is None


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        (Slo(), True),
        (Slo(ttft_s=1.0, tpot_s=1.0, itl_p99_s=1.99), True),
        (Slo(ttft_s=0.99), False),
        (Slo(tpot_s=0.99), False),
        (Slo(itl_p99_s=1.9), False),
    ],
)
def test_goodput_counts_requests_that_met_every_limit(slo: Slo, met: bool) -> None:
    times_s = (1.0, 1.0, 1.0, 3.0, 5.0)  # TTFT 1, TPOT 1, gaps 0, 0, 2, 2
    if slo.itl_p99_s == 1.99:
        times_s = (1.0, 2.0, 3.0, 4.0, 5.0)
    summary = summarize([record(times_s), record(times_s, error="unavailable"), record((0.5,))], slo)
    assert summary.num_met_slo == (2 if met else 1)
    assert summary.goodput_per_s == pytest.approx(summary.num_met_slo / 5.0)
    assert (summary.num_finished, summary.errors) == (2, {"unavailable": 1})


def test_a_summary_of_nothing_has_no_figures() -> None:
    summary = summarize([], Slo(ttft_s=1.0))
    assert (summary.num_requests, summary.requests_per_s, summary.ttft_s) == (0, 0.0, None)


async def test_an_open_loop_sends_each_request_once_whatever_is_open() -> None:
    all_arrived = asyncio.Event()

    async def wait_for_all(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        if len(router.requests) == 20:
            all_arrived.set()
        await all_arrived.wait()
        async for message in count_up(request):
            yield message

    arrivals = (index / 1000 for index in range(20))
    workload = random_workload(arrivals, num_requests=20, input_len=7, output_len=5, seed=1)
    with ScriptedRouter(wait_for_all) as router:
        async with AsyncClient(router.address, retry=NO_RETRY) as client:
            records = await run_load(client, workload.make(TINY), {"timeout_s": 20.0})
    assert [found.index for found in records] == list(range(20))
    assert {(found.num_prompt_tokens, found.num_output_tokens, found.error) for found in records} == {(7, 5, None)}
    assert all(found.scheduled_s <= found.sent_s <= found.token_times_s[0] for found in records)
    assert all(request.ignore_eos for request in router.requests)
    summary = summarize(records, Slo())
    assert summary.output_tokens_per_s == pytest.approx(100 / summary.duration_s)
    assert summary.itl_s is not None
    assert summary.itl_s.n == 80


async def test_a_closed_loop_keeps_its_number_open() -> None:
    num_open = peak = 0
    three_open = asyncio.Barrier(3)  # with fewer open at once the test would hang

    async def count_open(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        nonlocal num_open, peak
        num_open += 1
        peak = max(peak, num_open)
        await three_open.wait()
        async for message in count_up(request):
            yield message
        num_open -= 1

    workload = random_workload(repeat(0.0), num_requests=12, input_len=3, output_len=2, seed=1)
    ended: list[RequestRecord] = []
    with ScriptedRouter(count_open) as router:
        async with AsyncClient(router.address, retry=NO_RETRY) as client:
            records = await run_load(client, workload.make(TINY), {}, concurrency=3, on_end=ended.append)
    assert peak == 3
    assert len(records) == len(ended) == len(router.requests) == 12


async def test_failures_are_counted_by_code_and_lose_no_request() -> None:
    async def fail_some(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        yield token(0)
        if request.token_ids.ids[0] % 2:
            raise Overloaded("full")
        yield finished(num_output_tokens=1)

    requests = [LoadRequest(prompt=[index], max_tokens=1) for index in range(10)]
    with ScriptedRouter(fail_some) as router:
        async with AsyncClient(router.address, retry=NO_RETRY) as client:
            records = await run_load(client, requests, {})
    summary = summarize(records, Slo())
    assert (summary.num_finished, summary.errors) == (5, {"overloaded": 5})
    assert {found.message for found in records if found.error} == {"full"}
    assert all(found.num_output_tokens == 1 for found in records)
