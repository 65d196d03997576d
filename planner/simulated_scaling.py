"""A simulated cluster whose pools a scaling policy changes: start-up, drain and role switch take their time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from ..scheduling.scaling_config import ScalingPolicy
from ..scheduling.scaling_signals import (
    POOLS,
    Pool,
    ScalingAction,
    ScalingDecision,
    ScalingSignals,
    TrafficSignal,
    WorkerSignal,
)
from .request_life import RequestLife
from .simulated_worker import SimulatedWorker
from .simulation_result import SimulationResult
from .simulator import Simulation
from .types import ClusterSpec, SimRequest, Slo

_LOOK_S = 0.25  # how often a draining worker is looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingTimes:
    """How long what a policy decides takes."""

    period_s: float = 5.0  # between two decisions
    startup_s: float = 30.0  # a new worker, from the decision until it serves
    switch_s: float = 2.0  # a role switch, after the drain


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingOutcome:
    """What became of the requests, the decisions, and the GPUs that were held meanwhile."""

    result: SimulationResult
    decisions: tuple[ScalingDecision, ...]
    samples: tuple[tuple[float, int, int, int], ...]  # (time, ready prefill, ready decode, GPUs held)
    gpu_s: float  # from the start until the last arrival
    max_gpus: int  # held at once
    num_actions: dict[str, int]  # by kind

    def goodput_per_gpu(self, slo: Slo) -> float:
        """Requests that met every limit, per second of a GPU."""
        return float(self.result.met(slo).sum()) / self.gpu_s

    @property
    def num_reversals(self) -> int:
        """How often the size of a pool, having moved one way, moved the other."""
        count = 0
        for pool in POOLS:
            moves = [b - a for a, b in pairwise(decision.targets[pool] for decision in self.decisions) if b != a]
            count += sum((a > 0) != (b > 0) for a, b in pairwise(moves))
        return count


@dataclass(slots=True, kw_only=True)
class _Member:
    """A worker of the fleet, from the decision to start it until its GPUs are free."""

    name: str
    pool: Pool
    state: Literal["starting", "ready", "draining"]
    since_s: float
    held_from_s: float
    worker: SimulatedWorker | None = None  # it has none while it starts
    drains: SimulatedWorker | None = None  # what it finishes before its switch
    busy_s: float = 0.0  # of the worker, at the last look
    gone_s: float | None = None


@dataclass(slots=True)
class _Interval:
    """What happened since the last decision."""

    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0  # of prompts that got their first token
    cached_tokens: int = 0
    output_tokens: int = 0
    num_ended: int = 0


class ScalingSimulation(Simulation):
    """A simulation of a split cluster that a policy scales.

    Args:
        scaling: the policy; None: the pools stay as they are.
        gpus: of a worker, by pool.
        max_gpus: starts beyond are left out, as a cluster without a free GPU would; None: there are always more.
        percentile: of TTFT and TPOT, in what the policy is told.
    """

    def __init__(
        self,
        cluster: ClusterSpec,
        requests: Sequence[SimRequest],
        *,
        scaling: ScalingPolicy | None,
        times: ScalingTimes | None = None,
        gpus: dict[Pool, int] | None = None,
        max_gpus: int | None = None,
        percentile: float = 90.0,
        on_decision: Callable[[ScalingDecision], None] = lambda decision: None,
        **options: Any,
    ) -> None:
        assert cluster.prefill is not None, "colocated workers are one pool; there is nothing to balance"
        super().__init__(cluster, requests, **options)
        self._scaling = scaling
        self._times = times or ScalingTimes()
        self._gpus = gpus or {"prefill": 1, "decode": 1}
        self._max_gpus = max_gpus
        self._percentile = percentile
        self._on_decision = on_decision
        self._interval = _Interval()
        self._decisions: list[ScalingDecision] = []
        self._samples: list[tuple[float, int, int, int]] = []
        self._num_actions: Counter[str] = Counter()
        self._arrivals = np.array([request.arrival_s for _, request in self._requests])
        tokens = np.array([float(request.isl) for _, request in self._requests])
        self._tokens = np.concatenate(([0.0], np.cumsum(tokens)))
        self._squares = np.concatenate(([0.0], np.cumsum(tokens**2)))
        self._seen = 0  # requests before the last decision
        self._cached_share = 0.0
        self._fleet: list[_Member] = []
        for name, worker in self.workers.items():
            pool: Pool = "prefill" if name.startswith("prefill") else "decode"
            self._fleet.append(
                _Member(name=name, pool=pool, state="ready", since_s=-1e9, held_from_s=0.0, worker=worker)
            )

    def run_scaled(self) -> ScalingOutcome:
        self._sample()
        self.at(self._times.period_s, self._tick)
        result = self.run()
        end_s = float(self._arrivals[-1])
        gpu_s = sum(
            self._gpus[member.pool] * max(0.0, min(member.gone_s or end_s, end_s) - member.held_from_s)
            for member in self._fleet
        )
        return ScalingOutcome(
            result=result,
            decisions=tuple(self._decisions),
            samples=tuple(self._samples),
            gpu_s=gpu_s,
            max_gpus=max(held for *_, held in self._samples),
            num_actions=dict(self._num_actions),
        )

    # --- what happens to requests ---

    def first_token(self, worker: SimulatedWorker, life: RequestLife, at_s: float) -> None:
        self._interval.ttft_s.append(at_s - life.request.arrival_s)
        self._interval.prompt_tokens += life.request.isl
        self._interval.cached_tokens += life.num_cached
        super().first_token(worker, life, at_s)

    def _ended(self, life: RequestLife, at_s: float) -> None:
        self._interval.num_ended += 1
        self._interval.output_tokens += life.request.osl
        if life.request.osl > 1 and life.first_token_s is not None:
            self._interval.tpot_s.append((at_s - life.first_token_s) / (life.request.osl - 1))
        super()._ended(life, at_s)

    # --- decisions ---

    def _tick(self) -> None:
        if self._num_ended >= len(self._requests):
            return  # nothing is left to decide for
        if self._scaling is not None:
            decision = self._scaling.decide(self._signals())
            self._decisions.append(decision)
            for action in decision.actions:
                self._enact(action)
            self._on_decision(decision)
        self._sample()
        self.at(self.queue.now_s + self._times.period_s, self._tick)

    def _signals(self) -> ScalingSignals:
        now_s, period_s = self.queue.now_s, self._times.period_s
        interval, self._interval = self._interval, _Interval()
        if interval.prompt_tokens:
            self._cached_share = interval.cached_tokens / interval.prompt_tokens
        seen, self._seen = self._seen, int(np.searchsorted(self._arrivals, now_s, side="right"))
        count, uncached = self._seen - seen, 1 - self._cached_share
        tokens = float(self._tokens[self._seen] - self._tokens[seen])
        num_queued = self.router.num_queued
        traffic = TrafficSignal(
            interval_s=period_s,
            num_arrived=count,
            prefill_tokens=round(tokens * uncached),
            prefill_tokens_squared=float(self._squares[self._seen] - self._squares[seen]) * uncached**2,
            cached_tokens=round(tokens * self._cached_share),
            num_ended=interval.num_ended,
            output_tokens=interval.output_tokens,
            num_queued=num_queued,
            queued_prefill_tokens=round(num_queued * tokens * uncached / count) if count else 0,
            ttft_s=self._of(interval.ttft_s),
            tpot_s=self._of(interval.tpot_s),
        )
        pools: dict[Pool, list[WorkerSignal]] = {"prefill": [], "decode": []}
        for member in self._fleet:
            if member.gone_s is None:
                pools[member.pool].append(self._signal(member, now_s, period_s))
        return ScalingSignals(
            at_s=now_s, traffic=traffic, prefill=tuple(pools["prefill"]), decode=tuple(pools["decode"])
        )

    def _of(self, seconds: list[float]) -> float | None:
        return float(np.percentile(seconds, self._percentile)) if seconds else None

    def _signal(self, member: _Member, now_s: float, period_s: float) -> WorkerSignal:
        worker = member.worker or member.drains
        if worker is None:
            return WorkerSignal(worker=member.name, state=member.state, state_s=now_s - member.since_s)
        blocks, log = worker.scheduler.blocks, worker.log
        busy_s, member.busy_s = log.busy_s - member.busy_s, log.busy_s
        return WorkerSignal(
            worker=member.name,
            state=member.state,
            state_s=now_s - member.since_s,
            num_sequences=worker.num_sequences,
            queued_prefill_tokens=worker.scheduler.outstanding_prefill_tokens,
            prefill_tokens_per_s=worker.prefill_tokens_per_s,
            decode_step_s=log.last_step_s[-1] if log.last_step_s else 0.0,
            kv_used=1 - blocks.num_available / blocks.num_blocks,
            kv_tokens=blocks.num_blocks * blocks.block_size,
            busy=min(1.0, busy_s / period_s),
        )

    # --- workers come, go and change ---

    def _enact(self, action: ScalingAction) -> None:
        now_s = self.queue.now_s
        if action.kind == "start":
            if self._max_gpus is not None and self._held() + self._gpus[action.pool] > self._max_gpus:
                return
            name = f"{action.pool}-started-{len(self._fleet)}"
            member = _Member(name=name, pool=action.pool, state="starting", since_s=now_s, held_from_s=now_s)
            self._fleet.append(member)
            self.at(now_s + self._times.startup_s, partial(self._serve, member))
        else:
            (member,) = [m for m in self._fleet if m.name == action.worker and m.gone_s is None]
            worker, member.worker = member.worker, None
            member.since_s = now_s
            if action.kind == "switch":
                assert action.to_pool is not None
                member.pool, member.state = action.to_pool, "starting"
            else:
                member.state = "draining"
            if worker is None:
                if member.drains is None:  # it never served; one between two roles is waited for
                    self._leave(member)
            else:
                member.drains = worker
                self.retire_worker(worker.name)
                self._look(member)
        self._num_actions[action.kind] += 1

    def _look(self, member: _Member) -> None:
        """Whether it has finished what it had."""
        worker = member.drains
        assert worker is not None
        blocks = worker.scheduler.blocks
        if worker.num_sequences or blocks.num_available < blocks.num_blocks:
            self.at(self.queue.now_s + _LOOK_S, partial(self._look, member))
            return
        if member.state == "draining":
            self._leave(member)
        else:
            self.at(self.queue.now_s + self._times.switch_s, partial(self._serve, member))

    def _serve(self, member: _Member) -> None:
        if member.gone_s is not None:
            return
        if member.state == "draining":
            self._leave(member)
            return
        name = self.add_prefill_worker() if member.pool == "prefill" else self.add_decode_worker()
        member.worker, member.drains = self.workers[name], None
        member.state, member.since_s, member.busy_s = "ready", self.queue.now_s, 0.0

    def _leave(self, member: _Member) -> None:
        member.gone_s = self.queue.now_s

    def _held(self) -> int:
        return sum(self._gpus[member.pool] for member in self._fleet if member.gone_s is None)

    def _sample(self) -> None:
        ready = Counter(m.pool for m in self._fleet if m.state == "ready" and m.gone_s is None)
        self._samples.append((self.queue.now_s, ready["prefill"], ready["decode"], self._held()))
