"""Load on a router: send requests on time (open loop) or a few at once (closed loop), and sum up what was measured."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..core.errors import SplitserveError
from .async_client import AsyncClient
from .generation import RetryPolicy
from .request import RequestOptions
from .results import GenerationResult
from .workload import LoadRequest

NO_RETRY = RetryPolicy(max_attempts=1)  # a load run counts every error


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """What one request met. In an open loop its clock starts at its scheduled arrival, late sending included."""

    index: int
    scheduled_s: float  # since the start of the run
    sent_s: float
    ended_s: float
    num_prompt_tokens: int  # 0 if the request failed
    num_cached_tokens: int
    num_output_tokens: int  # received, also of a request that failed
    token_times_s: tuple[float, ...]  # since the start of the run
    error: str | None  # code of the typed error; None: finished
    message: str
    kv_bytes: int
    transport: str
    prefill_s: float  # on the prefill worker, without waiting
    transfer_exposed_s: float  # of the transfer, what came after the prefill
    prefill_worker: str
    decode_worker: str

    @property
    def ttft_s(self) -> float | None:
        return self.token_times_s[0] - self.scheduled_s if self.token_times_s else None

    @property
    def e2e_s(self) -> float | None:
        return self.token_times_s[-1] - self.scheduled_s if self.token_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """(e2e - TTFT) / (tokens - 1); None below two tokens."""
        if len(self.token_times_s) < 2:
            return None
        return (self.token_times_s[-1] - self.token_times_s[0]) / (len(self.token_times_s) - 1)

    @property
    def itl_s(self) -> list[float]:
        """Each single gap between two tokens; tokens that came in one message are 0 apart."""
        return [later - earlier for earlier, later in pairwise(self.token_times_s)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What a request must meet to count as goodput; None: not asked for."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    itl_p99_s: float | None = None

    def met_by(self, record: RequestRecord) -> bool:
        """Whether a request finished and met every limit; a gap that does not exist meets its limit."""
        if record.error is not None:
            return False
        itl_s = record.itl_s
        measured = (
            (self.ttft_s, record.ttft_s),
            (self.tpot_s, record.tpot_s),
            (self.itl_p99_s, percentile(itl_s, 99) if itl_s else None),
        )
        return all(limit is None or value is None or value <= limit for limit, value in measured)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Of one quantity over the requests, or gaps, that have it; seconds."""

    n: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSummary:
    """A run in figures. Latencies are of finished requests; rates are over the run's duration."""

    num_requests: int
    num_finished: int
    errors: dict[str, int]  # code -> count
    duration_s: float  # start of the run to the last end
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    goodput_per_s: float  # finished requests/s that met every SLO
    num_met_slo: int
    max_send_lag_s: float  # worst delay of this client itself: when large, distrust the run
    ttft_s: Distribution | None
    tpot_s: Distribution | None
    itl_s: Distribution | None
    e2e_s: Distribution | None


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100), interpolated linearly between the two nearest ranks."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * q / 100
    low, high = math.floor(rank), math.ceil(rank)
    # Rounding may step past the upper value by one unit in the last place.
    return min(ordered[high], ordered[low] + (ordered[high] - ordered[low]) * (rank - low))


def distribution(values: Sequence[float]) -> Distribution | None:
    """None where there is nothing to describe."""
    if not values:
        return None
    return Distribution(
        n=len(values),
        mean=math.fsum(values) / len(values),
        p50=percentile(values, 50),
        p90=percentile(values, 90),
        p99=percentile(values, 99),
        max=max(values),
    )


def summarize(records: Sequence[RequestRecord], slo: Slo) -> LoadSummary:
    """Figures of a run."""
    finished = [record for record in records if record.error is None]
    num_met = sum(slo.met_by(record) for record in finished)
    duration_s = max((record.ended_s for record in records), default=0.0)
    per_s = 1 / duration_s if duration_s > 0 else 0.0
    return LoadSummary(
        num_requests=len(records),
        num_finished=len(finished),
        errors=dict(Counter(record.error for record in records if record.error is not None)),
        duration_s=duration_s,
        requests_per_s=len(finished) * per_s,
        input_tokens_per_s=sum(record.num_prompt_tokens for record in finished) * per_s,
        output_tokens_per_s=sum(record.num_output_tokens for record in records) * per_s,
        goodput_per_s=num_met * per_s,
        num_met_slo=num_met,
        max_send_lag_s=max((record.sent_s - record.scheduled_s for record in records), default=0.0),
        ttft_s=distribution([value for record in finished if (value := record.ttft_s) is not None]),
        tpot_s=distribution([value for record in finished if (value := record.tpot_s) is not None]),
        itl_s=distribution([gap for record in finished for gap in record.itl_s]),
        e2e_s=distribution([value for record in finished if (value := record.e2e_s) is not None]),
    )


async def run_load(
    client: AsyncClient,
    requests: Iterable[LoadRequest],
    options: RequestOptions,
    *,
    concurrency: int | None = None,
    on_end: Callable[[RequestRecord], None] = lambda record: None,
) -> list[RequestRecord]:
    """Send the requests and wait for their ends; records in the order of the requests.

    Args:
        requests: drawn one at a time, just before they are sent.
        concurrency: None sends each at its `at_s`, however many are open; a number keeps that many open instead.
        on_end: called as each request ends, for progress.
    """
    start_s = time.monotonic()
    records: list[RequestRecord] = []

    async def send(index: int, request: LoadRequest, scheduled_s: float) -> None:
        record = await _send(client, request, options, index=index, scheduled_s=scheduled_s, start_s=start_s)
        records.append(record)
        on_end(record)

    numbered = enumerate(requests)

    async def keep_sending() -> None:
        for index, request in numbered:
            await send(index, request, time.monotonic() - start_s)

    async with asyncio.TaskGroup() as tasks:
        if concurrency is not None:
            for _ in range(concurrency):
                tasks.create_task(keep_sending())
        else:
            for index, request in numbered:
                await asyncio.sleep(start_s + request.at_s - time.monotonic())
                tasks.create_task(send(index, request, request.at_s))
    return sorted(records, key=lambda record: record.index)


async def _send(
    client: AsyncClient,
    request: LoadRequest,
    options: RequestOptions,
    *,
    index: int,
    scheduled_s: float,
    start_s: float,
) -> RequestRecord:
    sent_s = time.monotonic() - start_s
    token_times_s: list[float] = []
    result: GenerationResult | None = None
    failure: SplitserveError | None = None
    asked: RequestOptions = {**options, "max_tokens": request.max_tokens, "ignore_eos": request.ignore_eos}
    try:
        async with client.stream(request.prompt, **asked) as stream:
            async for chunk in stream:
                token_times_s += [time.monotonic() - start_s] * len(chunk.token_ids)
            result = await stream.result()
    except SplitserveError as error:
        failure = error
    return RequestRecord(
        index=index,
        scheduled_s=scheduled_s,
        sent_s=sent_s,
        ended_s=time.monotonic() - start_s,
        num_prompt_tokens=result.usage.num_prompt_tokens if result else 0,
        num_cached_tokens=result.usage.num_cached_tokens if result else 0,
        num_output_tokens=len(token_times_s),
        token_times_s=tuple(token_times_s),
        error=failure.code if failure else None,
        message=failure.message if failure else "",
        kv_bytes=result.timing.kv_bytes if result else 0,
        transport=result.timing.transport if result else "",
        prefill_s=result.timing.prefill_s if result else 0.0,
        transfer_exposed_s=result.timing.transfer_exposed_s if result else 0.0,
        prefill_worker=result.timing.prefill_worker if result else "",
        decode_worker=result.timing.decode_worker if result else "",
    )
