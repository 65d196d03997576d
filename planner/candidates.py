"""Clusters that could serve the traffic: each pool sized by the closed form alone, then combined and priced."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..core.errors import ConfigError
from .closed_form import (
    PERCENTILES,
    Estimate,
    estimate,
    estimate_colocated,
    estimate_decode,
    estimate_prefill,
    prompt_seconds,
)
from .load import Load
from .question import Question, WorkerChoice, worker_choices
from .types import ClusterSpec, PoolSpec, Slo

_ENDLESS = 4096  # workers: more than anybody would ask about
_SPREAD = (-1, 0, 1, 2)  # around the number of workers that the closed form finds: it may err either way


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Workers of one kind, as they would be deployed."""

    choice: WorkerChoice
    num_workers: int  # that carry the load
    spares: int = 0

    @property
    def workers(self) -> int:
        return self.num_workers + self.spares

    @property
    def num_gpus(self) -> int:
        return self.workers * self.choice.tp

    @property
    def cost_per_hour(self) -> float:
        return self.workers * self.choice.cost_per_hour


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One cluster: two pools, or colocated workers in `decode`."""

    prefill: Pool | None
    decode: Pool

    @property
    def num_gpus(self) -> int:
        return self.decode.num_gpus + (self.prefill.num_gpus if self.prefill else 0)

    @property
    def cost_per_hour(self) -> float:
        return self.decode.cost_per_hour + (self.prefill.cost_per_hour if self.prefill else 0.0)

    def cluster(self, question: Question, *, link_factor: float = 1.0) -> ClusterSpec:
        """As closed form and simulator take it; spares carry nothing."""
        prefill = self.prefill
        return ClusterSpec(
            prefill=PoolSpec(worker=prefill.choice.spec, num_workers=prefill.num_workers) if prefill else None,
            decode=PoolSpec(worker=self.decode.choice.spec, num_workers=self.decode.num_workers),
            kv_bytes_per_token=question.kv_bytes_per_token,
            link_bytes_per_s=question.link_bytes_per_s * link_factor,
            link_latency_s=question.link_latency_s,
            router_s=question.router_s,
            prefix_cache=question.prefix_cache,
        )


def judged_percentile(slo: Slo) -> float:
    """The one that the closed form computes, nearest above the one that is asked for."""
    return next((p for p in PERCENTILES if p >= slo.percentile), PERCENTILES[-1])


def meets(found: Estimate, slo: Slo) -> bool:
    """Whether every limit is met at the percentile (the nearest one above that the closed form computes)."""
    at = judged_percentile(slo)
    limits = ((slo.ttft_s, found.ttft_s), (slo.tpot_s, found.tpot_s), (slo.itl_s, found.itl_s))
    return not found.binding and all(limit is None or not values or values[at] <= limit for limit, values in limits)


def fewest_workers(evaluate: Callable[[int], Estimate], slo: Slo, most: int) -> int | None:
    """Least number of workers that meet the limits; None if not even `most` do."""
    if most < 1 or not meets(evaluate(most), slo):
        return None
    low, high = 0, most  # low does not, high does
    while high - low > 1:
        middle = (low + high) // 2
        if meets(evaluate(middle), slo):
            high = middle
        else:
            low = middle
    return high


Sized = list[tuple[WorkerChoice, int]]


class Sizing:
    """Pools sized for one load; what it computes for a pool serves every combination with others."""

    def __init__(self, question: Question) -> None:
        self._question = question
        self.choices: Mapping[str, list[WorkerChoice]] = {
            "prefill": worker_choices(question, "prefill"),
            "decode": worker_choices(question, "decode"),
            "colocated": worker_choices(question, "colocated"),
        }
        self.link_bytes_per_s = question.link_bytes_per_s
        self.slo = question.slo
        self.max_gpus = question.max_gpus
        self.num_evaluated = 0

    def refuse_impossible_limits(self) -> None:
        """Raises: ConfigError: no worker could meet a limit even for a request that is alone."""
        question, slo, load = self._question, self._question.slo, self._question.load
        prefill = [*self.choices["prefill"], *self.choices["colocated"]]
        if slo.ttft_s is not None:
            part = min(len(load.isl) - 1, int(len(load.isl) * slo.percentile / 100))
            floor, best = min(
                (
                    float(prompt_seconds(c.spec.latency, load.isl, load.cached, c.spec.max_step_tokens)[part]),  # type: ignore[arg-type]
                    f"{c.tp} x {c.gpu.name}",
                )
                for c in prefill
            )
            floor += question.router_s
            if floor > slo.ttft_s:
                raise ConfigError(
                    f"--ttft-ms {slo.ttft_s * 1e3:g} is below the floor: a prompt of {load.isl[part]:,.0f} tokens "
                    f"alone takes {floor * 1e3:,.1f} ms on {best}; raise the limit, shorten prompts or take faster GPUs"
                )
        for flag, limit in (("--tpot-ms", slo.tpot_s), ("--itl-ms", slo.itl_s)):
            if limit is None:
                continue
            context = int(load.resident_context)
            floor, best = min(
                (c.spec.latency.decode_step_s(1, context), f"{c.tp} x {c.gpu.name}")
                for c in [*self.choices["decode"], *self.choices["colocated"]]
            )
            if floor > limit:
                raise ConfigError(
                    f"{flag} {limit * 1e3:g} is below the floor: one sequence alone takes {floor * 1e3:,.2f} ms a "
                    f"token on {best}; raise the limit, quantise (--dtype fp8) or take faster GPUs"
                )

    def disaggregated(self, load: Load) -> list[Candidate]:
        """Two-pool clusters around the fewest workers of each kind, cheapest first, whatever the link can carry."""
        question = self._question
        spares = int(question.n_plus_one)
        prefill, decode = (
            [Pool(choice=choice, num_workers=count, spares=spares) for choice, count in self._sizes(role, load)]
            for role in ("prefill", "decode")
        )
        self.num_evaluated += len(prefill) * len(decode)
        found = [Candidate(prefill=p, decode=d) for p in prefill for d in decode]
        return sorted((c for c in found if c.num_gpus <= question.max_gpus), key=_price)

    def linked(self, candidates: list[Candidate], load: Load, *, link_factor: float = 1.0) -> list[Candidate]:
        """Those whose links carry the KV."""
        need = load.rate * load.mean_isl * self._question.kv_bytes_per_token
        bandwidth = self._question.link_bytes_per_s * link_factor
        return [
            c for c in candidates if c.prefill and need < bandwidth * min(c.prefill.num_workers, c.decode.num_workers)
        ]

    def colocated(self, load: Load) -> list[Candidate]:
        """One-pool clusters around the fewest workers of each kind, cheapest first."""
        spares = int(self._question.n_plus_one)
        pools = [
            Pool(choice=choice, num_workers=count, spares=spares) for choice, count in self._sizes("colocated", load)
        ]
        self.num_evaluated += len(pools)
        found = [Candidate(prefill=None, decode=pool) for pool in pools if pool.num_gpus <= self._question.max_gpus]
        return sorted(found, key=_price)

    def cheapest(self, load: Load) -> tuple[float, float]:
        """Least $/h of a split and of a colocated cluster by the closed form; infinite where none meets the limits."""
        spares = int(self._question.n_plus_one)
        prices: list[float] = []
        for role in ("prefill", "decode", "colocated"):
            sized = self._fewest(role, load)
            prices.append(min((c.cost_per_hour * (n + spares) for c, n in sized), default=math.inf))
        return prices[0] + prices[1], prices[2]

    def estimate(self, candidate: Candidate, load: Load, link_factor: float = 1.0) -> Estimate:
        """The closed form's view of a whole cluster."""
        return estimate(candidate.cluster(self._question, link_factor=link_factor), load)

    def fits(self, load: Load, role: str) -> bool:
        """Whether a split or a colocated cluster within the limits meets the service levels, by the closed form."""
        question, spares = self._question, int(self._question.n_plus_one)
        if role == "colocated":
            return bool(self._fewest(role, load))
        pools = [self._fewest(name, load) for name in ("prefill", "decode")]
        gpus = [min(((n + spares) * c.tp for c, n in sized), default=math.inf) for sized in pools]
        return sum(gpus) <= question.max_gpus

    def binding(self, load: Load, role: str) -> str:
        """What keeps a pool from meeting the limits, and how many GPUs would do if only their number does."""
        sized = [
            (choice, count)
            for choice in self.choices[role]
            if (count := fewest_workers(self._evaluate(role, choice, load), self._question.slo, _ENDLESS)) is not None
        ]
        if sized:
            choice, count = min(sized, key=lambda item: item[0].tp * item[1])
            return f"{role} needs {count * choice.tp:,} GPUs ({count:,} x TP{choice.tp} {choice.gpu.name})"
        reasons = {self._evaluate(role, choice, load)(_ENDLESS).binding for choice in self.choices[role]} - {""}
        return f"{role}: {' or '.join(sorted(reasons)) or 'latency'}, however many workers there are"

    def _sizes(self, role: str, load: Load) -> Sized:
        spread = []
        for choice, count in self._fewest(role, load):
            most = self._most(choice, role)
            spread += [(choice, n) for n in sorted({count + d for d in _SPREAD}) if 1 <= n <= most]
        return spread

    def _fewest(self, role: str, load: Load) -> Sized:
        found = []
        for choice in self.choices[role]:
            count = fewest_workers(self._evaluate(role, choice, load), self._question.slo, self._most(choice, role))
            if count is not None:
                found.append((choice, count))
        return found

    def _most(self, choice: WorkerChoice, role: str) -> int:
        """Workers that fit into max_gpus beside one worker of the other pool, spares included."""
        other = 0
        if role != "colocated":
            smallest = min(c.tp for c in self.choices["decode" if role == "prefill" else "prefill"])
            other = smallest * (1 + int(self._question.n_plus_one))
        return (self._question.max_gpus - other) // choice.tp - int(self._question.n_plus_one)

    def _evaluate(self, role: str, choice: WorkerChoice, load: Load) -> Callable[[int], Estimate]:
        router_s, at = self._question.router_s, (judged_percentile(self._question.slo),)
        if role == "prefill":
            return lambda count: estimate_prefill(choice.spec, count, load, router_s, at)
        if role == "decode":
            return lambda count: estimate_decode(choice.spec, count, load)
        return lambda count: estimate_colocated(choice.spec, count, load, router_s, at)


def _price(candidate: Candidate) -> tuple[float, int]:
    return candidate.cost_per_hour, candidate.num_gpus
