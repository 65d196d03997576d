"""A cluster in figures for tests of scaling: workers come and go as decided, and load spreads evenly over them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

from splitserve.scheduling.pool_needs import ServiceLevel
from splitserve.scheduling.scaling_config import PoolBounds, ScalingConfig
from splitserve.scheduling.scaling_signals import (
    POOLS,
    Pool,
    ScalingDecision,
    ScalingSignals,
    TrafficSignal,
    WorkerSignal,
)

PERIOD_S = 5.0
STARTUP_S = 30.0
PROMPT_TOKENS, ANSWER_TOKENS = 2_000, 200
KV_TOKENS = 400_000


@dataclass(frozen=True)
class Times:
    """About an 8B model on a large GPU. Implements `StepTimes`."""

    prefill_token_s: float = 2.4e-5

    def prefill_step_s(self, chunks: object) -> float:
        return 0.005 + self.prefill_token_s * sum(new for new, _ in chunks)  # type: ignore[attr-defined]

    def decode_step_s(self, batch: int, context_tokens: int) -> float:
        return 0.005 + 2e-5 * batch + 3e-8 * context_tokens


def config(**changes: object) -> ScalingConfig:
    plain = ScalingConfig(
        prefill=PoolBounds(min_workers=1, max_workers=64),
        decode=PoolBounds(min_workers=1, max_workers=64),
        level=ServiceLevel(ttft_s=0.5, tpot_s=0.025),
        startup_s=STARTUP_S,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


@dataclass
class Worker:
    name: str
    pool: Pool
    ready_at: float
    since: float
    leaves_at: float | None = None


@dataclass
class ScaledCluster:
    """Enacts every decision: a start takes STARTUP_S, a drain 10 s, a switch 12 s."""

    prefill: int
    decode: int
    now: float = 1_000.0
    workers: list[Worker] = field(default_factory=list)
    history: list[ScalingDecision] = field(default_factory=list)

    def __post_init__(self) -> None:
        for pool, count in (("prefill", self.prefill), ("decode", self.decode)):
            self.workers += [Worker(f"{pool}-{n}", pool, 0.0, 0.0) for n in range(count)]  # type: ignore[arg-type]
        self._num_made = len(self.workers)

    def active(self, pool: Pool) -> int:
        return sum(w.pool == pool and w.leaves_at is None for w in self.workers)

    def signals(self, rate: float, *, num_arrived: int | None = None) -> ScalingSignals:
        arrived = round(rate * PERIOD_S) if num_arrived is None else num_arrived
        ready = max(1, sum(w.pool == "decode" and w.ready_at <= self.now for w in self.workers))
        resident = rate * ANSWER_TOKENS * 0.015 * (PROMPT_TOKENS + ANSWER_TOKENS / 2)
        used = min(1.0, resident / KV_TOKENS / ready)
        return ScalingSignals(
            at_s=self.now,
            traffic=TrafficSignal(
                interval_s=PERIOD_S,
                num_arrived=arrived,
                prefill_tokens=arrived * PROMPT_TOKENS,
                prefill_tokens_squared=float(arrived * PROMPT_TOKENS**2),
                num_ended=arrived,
                output_tokens=arrived * ANSWER_TOKENS,
            ),
            prefill=self._pool("prefill", 0.0),
            decode=self._pool("decode", used),
        )

    def _pool(self, pool: Pool, used: float) -> tuple[WorkerSignal, ...]:
        found = []
        for worker in self.workers:
            if worker.pool != pool:
                continue
            ready = worker.ready_at <= self.now
            state = "draining" if worker.leaves_at is not None else "ready" if ready else "starting"
            found.append(
                WorkerSignal(
                    worker=worker.name,
                    state=state,  # type: ignore[arg-type]
                    state_s=self.now - max(worker.since, worker.ready_at if ready else 0.0),
                    kv_used=used if state == "ready" else 0.0,
                    kv_tokens=KV_TOKENS,
                    prefill_tokens_per_s=40_000.0 if ready else 0.0,
                    decode_step_s=0.01 if ready else 0.0,
                    num_sequences=10 if ready else 0,
                )
            )
        return tuple(found)

    def enact(self, decision: ScalingDecision) -> None:
        self.history.append(decision)
        by_name = {worker.name: worker for worker in self.workers}
        for action in decision.actions:
            if action.kind == "start":
                name = f"{action.pool}-{self._num_made}"
                self._num_made += 1
                self.workers.append(Worker(name, action.pool, self.now + STARTUP_S, self.now))
            elif action.kind == "drain":
                by_name[action.worker].leaves_at = self.now + 10.0
            else:
                assert action.to_pool is not None
                worker = by_name[action.worker]
                worker.pool, worker.since, worker.ready_at = action.to_pool, self.now, self.now + 12.0
        self.now += PERIOD_S
        self.workers = [w for w in self.workers if w.leaves_at is None or w.leaves_at > self.now]

    def reversals(self, pool: Pool) -> int:
        """How often the target's direction turned."""
        targets = [decision.targets[pool] for decision in self.history]
        moves = [b - a for a, b in itertools.pairwise(targets) if b != a]
        return sum((a > 0) != (b > 0) for a, b in itertools.pairwise(moves))


def gpus(signals: ScalingSignals, per_worker: dict[Pool, int]) -> int:
    return sum(len(signals.pool(pool)) * per_worker[pool] for pool in POOLS)
