"""What the scaling policy is told: bounds, service levels, budget, and how quickly to act."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from ..core.errors import ConfigError
from .gpu_budget import PoolBounds, num_gpus
from .pool_needs import ServiceLevel, WorkerLimits
from .scaling_signals import Pool, ScalingDecision, ScalingSignals


class ScalingPolicy(Protocol):
    """Whatever decides; the controller and the simulator take any."""

    def decide(self, signals: ScalingSignals) -> ScalingDecision: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingConfig:
    """What the policy is told to do, and how quickly."""

    prefill: PoolBounds = field(default_factory=PoolBounds)
    decode: PoolBounds = field(default_factory=PoolBounds)
    level: ServiceLevel = field(default_factory=ServiceLevel)
    limits: WorkerLimits = field(default_factory=WorkerLimits)
    max_gpus: int | None = None  # of both pools together; a worker that drains still holds its own
    role_switch: bool = True
    startup_s: float = 60.0  # of a new worker: how far ahead traffic is forecast
    cold_start_s: float = 10.0  # what a worker reports so soon after it became ready says nothing
    margin: float = 0.15  # a pool shrinks only to what would carry so much more
    down_after_s: float = 120.0  # a pool shrinks to the most that it needed for so long
    switch_after_s: float = 60.0  # the same, where the other pool takes the worker
    up_cooldown_s: float = 5.0  # between two growths of a pool
    down_cooldown_s: float = 30.0  # from any change of a pool to its shrinking
    max_down_share: float = 0.25  # of a pool, in one decision
    recover_s: float = 10.0  # a backlog of prompts is to be gone after so long
    max_utilisation: float = 0.85  # of prefill workers
    max_kv_used: float = 0.85  # of decode workers' KV
    tpot_margin: float = 0.9  # of the TPOT limit that a step may take
    correction_s: float = 300.0  # in which what missed service levels taught is forgotten

    def __post_init__(self) -> None:
        """Raises: ConfigError: no size of the pools would do."""
        if not 0 < self.level.percentile < 100:
            raise ConfigError(
                f"the percentile is {self.level.percentile:g}; wanted above 0 and below 100, such as 99: no number of "
                "workers meets a service level for every request"
            )
        for name, bounds in self.bounds().items():
            if not 0 < bounds.min_workers <= bounds.max_workers:
                raise ConfigError(
                    f"the {name} pool's bounds are {bounds.min_workers} to {bounds.max_workers} workers; wanted at "
                    "least 1, and the lower one first"
                )
        fewest = num_gpus({pool: bounds.min_workers for pool, bounds in self.bounds().items()}, self.bounds())
        if self.max_gpus is not None and fewest > self.max_gpus:
            raise ConfigError(
                f"the GPU budget is {self.max_gpus} and the fewest workers of both pools hold {fewest}; raise the "
                "budget or lower the pools' least numbers of workers"
            )

    def bounds(self) -> dict[Pool, PoolBounds]:
        return {"prefill": self.prefill, "decode": self.decode}
