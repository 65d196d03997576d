"""What a simulation measured: an array per quantity, with a row per request, and figures over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.events import Event
from .kv_link import KvLinks
from .request_life import RequestLife
from .simulated_worker import SimulatedWorker
from .step_log import StepLog
from .types import ClusterSpec, Slo

Seconds = NDArray[np.float64]
_POINTS = np.array([0.125, 0.375, 0.625, 0.875])  # of a run of steps, each standing for a quarter of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """Of one quantity; seconds. inf: so many requests failed."""

    p50: float
    p90: float
    p99: float
    mean: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult:
    """Arrays have one row per request, in the order of the requests; inf where a request failed.

    ITL is of gaps, not of requests: `itl_gaps_s` are gaps and `itl_weights` how many there are of each.
    """

    arrival_s: Seconds
    ttft_s: Seconds
    tpot_s: Seconds  # NaN for answers of one token
    itl_max_s: Seconds  # NaN for answers of one token
    e2e_s: Seconds
    queue_s: Seconds  # from arrival to the start of prefill
    transfer_s: Seconds  # from the first byte of KV on the link to the last; 0 where none moved
    transfer_exposed_s: Seconds  # the part of it behind the first token
    decode_queue_s: Seconds  # from the arrival of the KV to the first decode step; 0 where none moved
    cached_tokens: NDArray[np.int64]  # prompt tokens that the prefix cache served
    output_tokens: NDArray[np.int64]
    itl_gaps_s: Seconds
    itl_weights: NDArray[np.float64]
    errors: dict[str, int]  # error code -> requests
    duration_s: float  # from the first arrival to the last end
    utilisation: dict[str, float]  # pool -> share of time in steps, mean over its workers
    mean_batch: dict[str, float]  # pool -> sequences that a step gave a token, mean over its steps
    link_utilisation: float  # of the busiest worker's side of the link
    kv_bytes: float  # moved
    num_preemptions: int
    marks: tuple[tuple[tuple[Event, float], ...], ...]  # life-cycle events of each request, as they were noted

    @property
    def events(self) -> list[list[tuple[Event, float]]]:
        """The life-cycle events of each request in order of time, in seconds of the simulation."""
        return [sorted(life, key=lambda mark: mark[1]) for life in self.marks]

    @property
    def num_requests(self) -> int:
        return len(self.ttft_s)

    @property
    def num_finished(self) -> int:
        return int(np.isfinite(self.e2e_s).sum())

    @property
    def requests_per_s(self) -> float:
        return self.num_finished / self.duration_s if self.duration_s > 0 else 0.0

    @property
    def output_tokens_per_s(self) -> float:
        return float(self.output_tokens.sum()) / self.duration_s if self.duration_s > 0 else 0.0

    @property
    def kv_bytes_per_s(self) -> float:
        return self.kv_bytes / self.duration_s if self.duration_s > 0 else 0.0

    def percentile(self, quantity: str, q: float) -> float:
        """The q-th percentile (0 to 100) of "ttft", "tpot", "itl", "itl_max", "e2e" or "queue" in seconds.

        Interpolated linearly between the two nearest ranks; NaN where nothing is defined.
        """
        if quantity == "itl":
            return _weighted_percentile(self.itl_gaps_s, self.itl_weights, q)
        values: Seconds = getattr(self, f"{quantity}_s")
        values = np.sort(values[~np.isnan(values)])
        if not len(values):
            return float("nan")
        low, high = int((len(values) - 1) * q / 100), -int(-(len(values) - 1) * q // 100)
        if low == high or np.isinf(values[high]):
            return float(values[high])
        return float(values[low] + (values[high] - values[low]) * ((len(values) - 1) * q / 100 - low))

    def percentiles(self, quantity: str) -> Percentiles:
        """p50, p90, p99, mean and maximum."""
        if quantity == "itl":
            weight = self.itl_weights.sum()
            mean = float((self.itl_gaps_s * self.itl_weights).sum() / weight) if weight else float("nan")
            most = float(self.itl_gaps_s.max()) if len(self.itl_gaps_s) else float("nan")
        else:
            values: Seconds = getattr(self, f"{quantity}_s")
            values = values[~np.isnan(values)]
            mean = float(values.mean()) if len(values) else float("nan")
            most = float(values.max()) if len(values) else float("nan")
        return Percentiles(
            p50=self.percentile(quantity, 50),
            p90=self.percentile(quantity, 90),
            p99=self.percentile(quantity, 99),
            mean=mean,
            max=most,
        )

    def met(self, slo: Slo) -> NDArray[np.bool_]:
        """Per request: it finished within every limit. Of ITL that is its longest gap; what is undefined meets it."""
        met = np.isfinite(self.e2e_s)
        for limit, values in ((slo.ttft_s, self.ttft_s), (slo.tpot_s, self.tpot_s), (slo.itl_s, self.itl_max_s)):
            if limit is not None:
                met &= np.isnan(values) | (values <= limit)
        return met

    def goodput(self, slo: Slo) -> float:
        """Requests per second that met every limit."""
        return float(self.met(slo).sum()) / self.duration_s if self.duration_s > 0 else 0.0

    def meets(self, slo: Slo) -> bool:
        """Whether the percentile that the service level names is within each limit."""
        limits = (("ttft", slo.ttft_s), ("tpot", slo.tpot_s), ("itl", slo.itl_s))
        return all(limit is None or not self.percentile(quantity, slo.percentile) > limit for quantity, limit in limits)


def summarize_lives(
    cluster: ClusterSpec, lives: Sequence[RequestLife], workers: Mapping[str, SimulatedWorker], links: KvLinks
) -> SimulationResult:
    """Columns from the lives, in their order."""
    count = len(lives)
    columns = {
        name: np.full(count, np.nan)
        for name in ("ttft", "tpot", "itl_max", "e2e", "queue", "transfer", "exposed", "decode_queue")
    }
    errors: dict[str, int] = {}
    for row, life in enumerate(lives):
        if life.error is not None:
            errors[life.error] = errors.get(life.error, 0) + 1
            for name in columns:
                columns[name][row] = np.inf
            continue
        _fill(columns, row, life)
    gaps, weights = _itl(lives, [worker.log for worker in workers.values()])
    start_s = lives[0].request.arrival_s if count == 1 else min(life.request.arrival_s for life in lives)
    duration_s = max(life.ended_s or 0.0 for life in lives) - start_s
    return SimulationResult(
        arrival_s=np.array([life.request.arrival_s for life in lives]),
        ttft_s=columns["ttft"],
        tpot_s=columns["tpot"],
        itl_max_s=columns["itl_max"],
        e2e_s=columns["e2e"],
        queue_s=columns["queue"],
        transfer_s=columns["transfer"],
        transfer_exposed_s=columns["exposed"],
        decode_queue_s=columns["decode_queue"],
        cached_tokens=np.array([life.num_cached for life in lives], dtype=np.int64),
        output_tokens=np.array([0 if life.error else life.request.osl for life in lives], dtype=np.int64),
        itl_gaps_s=gaps,
        itl_weights=weights,
        errors=errors,
        duration_s=duration_s,
        utilisation=_by_pool(workers, lambda logs: _mean_busy(logs, duration_s)),
        mean_batch=_by_pool(workers, _mean_batch),
        link_utilisation=max(links.busy_s.values(), default=0.0) / duration_s if duration_s > 0 else 0.0,
        kv_bytes=links.num_bytes,
        num_preemptions=sum(worker.scheduler.num_preemptions for worker in workers.values()),
        marks=tuple(tuple(life.marks) for life in lives),
    )


def _fill(columns: Mapping[str, Seconds], row: int, life: RequestLife) -> None:
    """One request's row."""
    assert life.ended_s is not None
    assert life.first_token_s is not None
    arrival_s, num_gaps = life.request.arrival_s, life.request.osl - 1
    started_s = life.marked(Event.PREFILL_STARTED)
    columns["ttft"][row] = life.first_token_s - arrival_s
    columns["e2e"][row] = life.ended_s - arrival_s
    columns["queue"][row] = (started_s if started_s is not None else life.first_token_s) - arrival_s
    if num_gaps:
        columns["tpot"][row] = (life.ended_s - life.first_token_s) / num_gaps
        columns["itl_max"][row] = life.max_itl_s()
    moved_from_s, moved_s = life.transfer_started_s, life.transfer_finished_s
    columns["transfer"][row] = moved_s - moved_from_s if moved_from_s is not None else 0.0
    columns["exposed"][row] = max(0.0, moved_s - life.first_token_s) if moved_from_s is not None else 0.0
    decode_s = life.marked(Event.DECODE_STARTED)
    columns["decode_queue"][row] = 0.0 if decode_s is None else decode_s - life.transfer_finished_s


def _itl(lives: Sequence[RequestLife], logs: Sequence[StepLog]) -> tuple[Seconds, NDArray[np.float64]]:
    """Every gap between two tokens, with how many there are of each; a run of steps is told by four of them."""
    own = np.array([gap for life in lives for gap in life.gaps_s])
    gaps, weights = [own], [np.ones(len(own))]
    for log in logs:
        steps, batch = np.array(log.num_steps, dtype=float), np.array(log.batch, dtype=float)
        first, last = np.array(log.first_step_s), np.array(log.last_step_s)
        joined = np.array(log.num_joined, dtype=float)
        single = steps == 1
        gaps.append(first[single])
        weights.append((batch - joined)[single])
        long = ~single
        gaps.append((first[long, None] + (last - first)[long, None] * _POINTS).ravel())
        weights.append(np.repeat((steps * batch - joined)[long] / len(_POINTS), len(_POINTS)))
    all_gaps, all_weights = np.concatenate(gaps), np.concatenate(weights)
    real = all_weights > 0
    return all_gaps[real], all_weights[real]


def _weighted_percentile(values: Seconds, weights: NDArray[np.float64], q: float) -> float:
    if not len(values):
        return float("nan")
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order])
    return float(values[order][min(np.searchsorted(reached, reached[-1] * q / 100), len(values) - 1)])


def _by_pool(workers: Mapping[str, SimulatedWorker], figure: Callable[[Sequence[StepLog]], float]) -> dict[str, float]:
    pools: dict[str, list[StepLog]] = {}
    for name, worker in workers.items():
        pools.setdefault(name.rpartition("-")[0], []).append(worker.log)
    return {pool: figure(logs) for pool, logs in pools.items()}


def _mean_busy(logs: Sequence[StepLog], duration_s: float) -> float:
    return sum(log.busy_s for log in logs) / len(logs) / duration_s if duration_s > 0 else 0.0


def _mean_batch(logs: Sequence[StepLog]) -> float:
    steps = sum(sum(log.num_steps) for log in logs)
    tokens = sum(number * batch for log in logs for number, batch in zip(log.num_steps, log.batch, strict=True))
    return tokens / steps if steps else 0.0
