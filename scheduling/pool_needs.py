"""How many workers a forecast traffic needs: prefill by its queue and TTFT, decode by KV memory and TPOT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol

from .queueing import waiting_probability


class StepTimes(Protocol):
    """Seconds of one engine step. The planner's latency models are of this kind; deploy hands one in."""

    def prefill_step_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        """One step of prompt chunks: (new tokens, tokens already in the KV cache) of each sequence."""
        ...

    def decode_step_s(self, batch: int, context_tokens: int) -> float:
        """One step that gives each of `batch` sequences a token; `context_tokens` is the sum of their contexts."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSteps:
    """Step times of a cluster that nobody calibrated, from what its workers report. Implements `StepTimes`."""

    prefill_tokens_per_s: float  # 0 when unknown
    step_s: float  # of decode, 0 when unknown,
    batch: float  # with so many sequences

    def prefill_step_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        return sum(new for new, _ in chunks) / self.prefill_tokens_per_s

    def decode_step_s(self, batch: int, context_tokens: int) -> float:
        """Half of a step is taken to be there for any batch, the other half to grow with it."""
        return self.step_s / 2 * (1 + batch / max(1.0, self.batch))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLevel:
    """Limits that `percentile` of the requests must meet; None is no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    percentile: float = 90.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """What the engine's configuration sets."""

    max_step_tokens: int = 8192  # prefill tokens of a step
    max_packed_tokens: int | None = None  # no further prompt joins a step with so many; None: up to max_step_tokens
    max_running: int = 256
    headroom_tokens: int = 64  # that a grant reserves past the prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Traffic in figures; lengths are means over requests."""

    requests_per_s: float
    prefill_tokens: float  # that no cache holds
    prefill_spread: float = 0.0  # their standard deviation
    cached_tokens: float = 0.0
    output_tokens: float = 1.0

    @property
    def context_tokens(self) -> float:
        """Of a running answer, half-way."""
        return self.prefill_tokens + self.cached_tokens + self.output_tokens / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """What prompts cost: a short and a long one stand for all."""

    mean_s: float
    spread: float  # (1 + cv^2) / 2 of the seconds: how much worse than a clock they queue
    parts: tuple[tuple[float, float], ...]  # (share of the prompts, seconds of one)


def prompt_cost(demand: Demand, times: StepTimes, limits: WorkerLimits) -> Prefill:
    """Two prompts with the weights that give lengths their mean and spread: costs are about quadratic in length."""
    mean, deviation = max(1.0, demand.prefill_tokens), demand.prefill_spread
    skew = min(1.0, 0.75 * mean / deviation) if deviation else 1.0  # no prompt below a quarter of the mean
    long_share = skew**2 / (1 + skew**2)
    parts = tuple(
        (share, _prompt_s(tokens, demand.cached_tokens, times, limits))
        for share, tokens in ((1 - long_share, mean - skew * deviation), (long_share, mean + deviation / skew))
    )
    mean_s = sum(share * seconds for share, seconds in parts)
    square = sum(share * seconds**2 for share, seconds in parts)
    return Prefill(mean_s=mean_s, spread=(1 + max(0.0, square / mean_s**2 - 1)) / 2, parts=parts)


def _prompt_s(tokens: float, cached: float, times: StepTimes, limits: WorkerLimits) -> float:
    """Seconds of one prompt on a busy worker: in chunks if it is long, beside others in a step if it is short."""
    whole, before = max(1, round(tokens)), round(cached)
    packed = min(limits.max_packed_tokens or limits.max_step_tokens, limits.max_step_tokens)
    if whole < packed:
        together = packed // whole
        return times.prefill_step_s([(whole, before)] * together) / together
    seconds, chunk = 0.0, limits.max_step_tokens
    for done in range(0, whole, chunk):
        seconds += times.prefill_step_s([(min(chunk, whole - done), before + done)])
    return seconds


def prefill_workers(demand: Demand, cost: Prefill, level: ServiceLevel, *, max_utilisation: float) -> int:
    """Fewest workers with which no more prompts than the percentile leaves are later than the TTFT limit.

    Waits are those of M/G/c: Erlang C's probability, an exponential tail, Pollaczek and Khinchine's correction. A kind
    of prompt that takes longer than the limit by itself has a tenth of it for waiting: no pool is large enough for it.
    """
    offered = demand.requests_per_s * cost.mean_s
    fewest = math.ceil(offered / max_utilisation - 1e-9)
    if level.ttft_s is None or offered <= 0:
        return fewest
    slacks = [(share, max(level.ttft_s - seconds, level.ttft_s / 10)) for share, seconds in cost.parts]
    tail, blocking, count = 1 - level.percentile / 100, 1.0, 0
    while True:
        count += 1
        blocking = offered * blocking / (count + offered * blocking)
        if count < fewest or count <= offered:
            continue
        decay = (count - offered) / cost.mean_s / cost.spread
        late = sum(share * math.exp(-decay * slack_s) for share, slack_s in slacks)
        if late * waiting_probability(count, offered, blocking) <= tail:
            return count


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBatch:
    """What one decode worker carries."""

    sequences: float  # on average
    step_s: float  # with so many
    bound: str  # what keeps it from more: "TPOT", "KV memory" or "max_running"

    @property
    def tokens_per_s(self) -> float:
        return self.sequences / self.step_s


def decode_batch(
    demand: Demand,
    times: StepTimes,
    level: ServiceLevel,
    limits: WorkerLimits,
    *,
    kv_tokens: int,
    max_kv_used: float,
    tpot_margin: float,
) -> DecodeBatch:
    """The mean batch whose fluctuation still stays within KV memory, TPOT and max_running.

    A TPOT that no batch meets is no bound: more workers would not help.
    """
    context = demand.context_tokens

    def step_s(batch: float) -> float:
        whole = max(1, round(batch))
        return times.decode_step_s(whole, round(whole * context))

    most, bound = float(limits.max_running), "max_running"
    if kv_tokens:
        fits = max(1.0, max_kv_used * kv_tokens / (context + limits.headroom_tokens))
        if fits < most:
            most, bound = fits, "KV memory"
    if level.tpot_s is not None and step_s(1) <= (limit_s := level.tpot_s * tpot_margin) < step_s(most):
        low, high = 1, math.ceil(most)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if step_s(middle) <= limit_s else (low, middle)
        most, bound = float(low), "TPOT"
    # As many as arrive in the life of one are resident: about Poisson, so leave room for the percentile of that.
    deviations = max(0.0, NormalDist().inv_cdf(level.percentile / 100))
    root = (-deviations + math.sqrt(deviations**2 + 4 * most)) / 2
    sequences = max(0.5, root**2)
    return DecodeBatch(sequences=sequences, step_s=step_s(sequences), bound=bound)


def decode_workers(demand: Demand, batch: DecodeBatch) -> int:
    """Fewest workers that make as many tokens as are asked for; the first token of each answer comes from prefill."""
    tokens_per_s = demand.requests_per_s * max(0.0, demand.output_tokens - 1)
    return math.ceil(tokens_per_s / batch.tokens_per_s - 1e-9)
