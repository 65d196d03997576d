"""Queueing formulas for pools: utilisation, Little's law and waiting tails. They prune; the simulator judges.

Prefill is a G/G/c queue of prompts (Allen and Cunneen's correction of Erlang C); decode is a batch that grows until it
makes as many tokens as arrive (Little's law), with Poisson fluctuation; a colocated worker does both in mixed steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..scheduling.queueing import erlang_c
from .fitting import Array
from .latency import StepLatency
from .load import Load
from .types import ClusterSpec, WorkerSpec

PERCENTILES = (50.0, 90.0, 99.0)
_Z = {50.0: 0.0, 90.0: 1.2816, 95.0: 1.6449, 99.0: 2.3263}
_SATURATED = 0.99  # utilisation from which no queue is worth computing
_HEADROOM_TOKENS = 64  # that a grant reserves past the prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One pool or cluster under one load. Latencies by percentile; infinite where a queue has no end."""

    ttft_s: Mapping[float, float]
    tpot_s: Mapping[float, float]
    itl_s: Mapping[float, float]
    utilisation: Mapping[str, float]  # prefill, decode, link; or colocated
    binding: str = ""  # what makes it impossible, empty if nothing does
    batch: float = 0.0  # mean sequences a decode worker runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """P(wait > t) = probability x exp(-decay t)."""

    probability: float
    decay: float

    @property
    def mean_s(self) -> float:
        return self.probability / self.decay if self.decay > 0 else math.inf

    def beyond(self, seconds: Array) -> Array:
        """Probability of waiting longer than each of these; 1 where one is negative."""
        return np.where(seconds < 0, 1.0, self.probability * np.exp(-self.decay * np.maximum(seconds, 0)))


def queue_wait(*, rate: float, servers: int, mean_s: float, cv: float, arrival_cv: float) -> Wait:
    """Waiting in G/G/c: exact for M/M/c, Pollaczek and Khinchine's mean for M/G/1."""
    offered = rate * mean_s
    if offered >= servers * _SATURATED:
        return Wait(probability=1.0, decay=0.0)
    spread = max(1e-3, (arrival_cv**2 + cv**2) / 2)
    return Wait(probability=erlang_c(servers, offered), decay=(servers - offered) / mean_s / spread)


def sojourn_percentile(wait: Wait, service_s: Array, percentile: float) -> float:
    """Percentile of wait + service, for services given by equal parts."""
    if wait.decay == 0:
        return math.inf
    tail = 1 - percentile / 100
    longest_wait = max(0.0, math.log(max(wait.probability, 1e-12) / tail)) / wait.decay
    low, high = float(service_s.min()), float(service_s.max()) + longest_wait
    if len(service_s) == 1:
        return high
    for _ in range(25):
        middle = (low + high) / 2
        if float(wait.beyond(middle - service_s).mean()) > tail:
            low = middle
        else:
            high = middle
    return high


def prompt_seconds(latency: StepLatency, isl: Array, cached: Array, chunk: int) -> Array:
    """Prefill of each prompt alone."""
    return np.array([latency.prompt_s(i, chunk, c) for i, c in zip(isl.tolist(), cached.tolist(), strict=True)])


def _shared_seconds(latency: StepLatency, load: Load, alone: Array, worker: WorkerSpec) -> Array:
    """Prefill of each prompt on a busy worker: steps are full, so short prompts share what a step costs."""
    tokens = np.maximum(1.0, load.isl - load.cached)
    full = min(worker.max_step_tokens, worker.max_packed_tokens or worker.max_step_tokens)
    base = latency.prefill_base_s + latency.prefill_expert_s
    return np.maximum(alone - base * np.maximum(0.0, 1 - tokens / full), alone * 0.02)


def estimate_prefill(
    worker: WorkerSpec, num_workers: int, load: Load, router_s: float, percentiles: Sequence[float] = PERCENTILES
) -> Estimate:
    """Time to first token of a prefill pool."""
    latency = _linear(worker)
    alone = prompt_seconds(latency, load.isl, load.cached, worker.max_step_tokens)
    shared = _shared_seconds(latency, load, alone, worker)
    utilisation = load.rate * float(shared.mean()) / num_workers
    if utilisation >= _SATURATED:
        return _impossible("prefill", utilisation, "prefill throughput")
    service = alone + (shared - alone) * utilisation
    mean_s = float(service.mean())
    wait = queue_wait(
        rate=load.rate,
        servers=num_workers,
        mean_s=mean_s,
        cv=float(service.std()) / mean_s,
        arrival_cv=load.arrival_cv,
    )
    ttft = {p: router_s + sojourn_percentile(wait, alone, p) for p in percentiles}
    return Estimate(ttft_s=ttft, tpot_s={}, itl_s={}, utilisation={"prefill": utilisation})


def estimate_decode(worker: WorkerSpec, num_workers: int, load: Load) -> Estimate:
    """Time per output token of a decode pool."""
    latency = _linear(worker)
    tokens_per_s = load.rate * max(0.0, load.mean_osl - 1) / num_workers
    limit = batch_limit(worker, load)
    if limit < 1:
        return _impossible("decode", math.inf, "KV memory of a decode worker: one sequence does not fit")
    most = limit / latency.decode_step_s(int(limit), limit * load.resident_context)
    utilisation = tokens_per_s / most
    if utilisation >= _SATURATED:
        memory = limit < worker.max_running
        return _impossible("decode", utilisation, "decode KV memory" if memory else "decode throughput")
    batch = _steady_batch(latency, tokens_per_s, load.resident_context, limit)
    itl = {p: _step(latency, min(limit, batch + _Z[p] * math.sqrt(batch)), load) for p in PERCENTILES}
    return Estimate(ttft_s={}, tpot_s=itl, itl_s=itl, utilisation={"decode": utilisation}, batch=batch)


def estimate_colocated(
    worker: WorkerSpec, num_workers: int, load: Load, router_s: float, percentiles: Sequence[float] = PERCENTILES
) -> Estimate:
    """Workers that prefill in chunks beside their decode batch; each takes an equal share of the requests."""
    latency = _linear(worker)
    rate, chunk = load.rate / num_workers, worker.max_step_tokens
    tokens_per_s = rate * max(0.0, load.mean_osl - 1)
    limit = batch_limit(worker, load)
    if limit < 1:
        return _impossible("colocated", math.inf, "KV memory of a worker: one sequence does not fit")
    alone = prompt_seconds(latency, load.isl, load.cached, chunk)
    shared = _shared_seconds(latency, load, alone, worker)
    prompt_tokens = np.maximum(1.0, load.isl - load.cached)
    # Of a prompt's time, what it adds to a step that decodes anyway.
    added = np.maximum(0.0, shared - latency.prefill_base_s * np.ceil(prompt_tokens / chunk))
    prefill_share = rate * float(added.mean())
    full = _step(latency, limit, load)
    utilisation = prefill_share + tokens_per_s * full / limit
    if utilisation >= _SATURATED:
        return _impossible("colocated", utilisation, "throughput of the workers")
    batch = _steady_batch(latency, tokens_per_s / (1 - prefill_share), load.resident_context, limit)
    tpot = {
        p: _step(latency, min(limit, batch + _Z[p] * math.sqrt(batch)), load) / (1 - prefill_share) for p in PERCENTILES
    }
    # A prompt advances a chunk a step, and each step also decodes the batch.
    decode_part = max(0.0, _step(latency, batch, load) - latency.decode_base_s)
    service = alone + np.ceil(prompt_tokens / chunk) * decode_part
    mean_s = float(service.mean())
    wait = queue_wait(
        rate=load.rate,
        servers=num_workers,
        mean_s=mean_s,
        cv=float(service.std()) / mean_s,
        arrival_cv=load.arrival_cv,
    )
    ttft = {p: router_s + sojourn_percentile(wait, service, p) for p in percentiles}
    step_s = _step(latency, batch, load)
    mixed_s = step_s + float(np.minimum(added, added / np.ceil(prompt_tokens / chunk)).mean())
    mixed_share = min(1.0, rate * float(np.ceil(prompt_tokens / chunk).mean()) * mixed_s)
    itl = {p: (mixed_s if mixed_share > 1 - p / 100 else step_s) for p in PERCENTILES}
    binding = "" if math.isfinite(min(ttft.values())) else "throughput of the workers"
    return Estimate(
        ttft_s=ttft, tpot_s=tpot, itl_s=itl, utilisation={"colocated": utilisation}, batch=batch, binding=binding
    )


def estimate(cluster: ClusterSpec, load: Load) -> Estimate:
    """A whole cluster: both pools and the link between them, or its colocated workers."""
    if cluster.prefill is None:
        return estimate_colocated(cluster.decode.worker, cluster.decode.num_workers, load, cluster.router_s)
    prefill = estimate_prefill(cluster.prefill.worker, cluster.prefill.num_workers, load, cluster.router_s)
    decode = estimate_decode(cluster.decode.worker, cluster.decode.num_workers, load)
    narrow = min(cluster.prefill.num_workers, cluster.decode.num_workers)
    link = load.rate * load.mean_isl * cluster.kv_bytes_per_token / (narrow * cluster.link_bytes_per_s)
    binding = prefill.binding or decode.binding or ("link bandwidth" if link >= _SATURATED else "")
    return Estimate(
        ttft_s=prefill.ttft_s,
        tpot_s=decode.tpot_s,
        itl_s=decode.itl_s,
        utilisation={**prefill.utilisation, **decode.utilisation, "link": link},
        binding=binding,
        batch=decode.batch,
    )


def batch_limit(worker: WorkerSpec, load: Load) -> float:
    """Sequences whose KV fits a worker's pool at once, as it fills on average."""
    resident = min(load.resident_context + _HEADROOM_TOKENS / 2, load.resident_peak) + worker.block_size / 2
    if load.resident_peak + worker.block_size > worker.num_blocks * worker.block_size:
        return 0.0
    return float(min(worker.max_running, worker.num_blocks * worker.block_size / resident))


def _steady_batch(latency: StepLatency, tokens_per_s: float, context: float, limit: float) -> float:
    """Little's law: the batch whose steps make as many tokens as arrive; the least such below `limit`."""
    low, high = 0.0, limit
    for _ in range(50):
        middle = (low + high) / 2
        if middle < tokens_per_s * _seconds(latency, middle, context):
            low = middle
        else:
            high = middle
    return high


def _seconds(latency: StepLatency, batch: float, context: float) -> float:
    # A step of no sequence is none; those of less than one are of one, some of the time.
    whole = max(1.0, batch)
    return latency.decode_step_s(whole, whole * context)


def _step(latency: StepLatency, batch: float, load: Load) -> float:
    return _seconds(latency, batch, load.resident_context)


def _linear(worker: WorkerSpec) -> StepLatency:
    """The closed form knows how linear steps add up; other latency models need the simulator."""
    assert isinstance(worker.latency, StepLatency), type(worker.latency)
    return worker.latency


def _impossible(pool: str, utilisation: float, binding: str) -> Estimate:
    endless = dict.fromkeys(PERCENTILES, math.inf)
    return Estimate(ttft_s=endless, tpot_s=endless, itl_s=endless, utilisation={pool: utilisation}, binding=binding)
