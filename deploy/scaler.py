"""Scaling in the running cluster: the configuration's policy, and the log from which its decisions are replayed."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from ..core.config import ClusterConfig
from ..core.errors import ConfigError
from ..planner.calibration import read_calibration
from ..planner.latency import StepLatency
from ..scheduling.gpu_budget import PoolBounds
from ..scheduling.pool_needs import ServiceLevel, WorkerLimits
from ..scheduling.scaling import SloScaling
from ..scheduling.scaling_config import ScalingConfig
from ..scheduling.scaling_log import ScalingRecord, read_records, replay
from ..scheduling.scaling_signals import POOLS, Pool, ScalingDecision, ScalingSignals
from .load_signals import LoadSignals

logger = logging.getLogger(__name__)


class Scaling:
    """Decides, and writes each decision down with what it was made of."""

    def __init__(self, config: ClusterConfig, log_dir: Path) -> None:
        self._key = _key(config)
        self._policy = scaling_policy(config)
        self.signals = LoadSignals(config.scaling.percentile)
        # One file for each policy: the decisions of a new one do not follow from what the one before had seen.
        self.log_path = log_dir / f"scaling-{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns()}.jsonl"

    def outdated(self, config: ClusterConfig) -> bool:
        """Whether the configuration asks for another policy."""
        return self._key != _key(config)

    def decide(self, signals: ScalingSignals) -> ScalingDecision:
        decision = self._policy.decide(signals)
        try:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            with self.log_path.open("a", encoding="utf-8") as log:
                log.write(ScalingRecord(signals=signals, decision=decision).to_line() + "\n")
        except OSError as error:
            logger.error("a decision is not written down: %s", error)
        return decision


def check_scaling(config: ClusterConfig) -> None:
    """Raises: ConfigError: it asks for scaling, and for what no policy can do; see scaling_policy."""
    if config.scaling.enabled:
        scaling_policy(config)


def scaling_policy(config: ClusterConfig) -> SloScaling:
    """Raises: ConfigError: the bounds or the budget cannot be kept, or the calibration cannot be read."""
    scaling = config.scaling
    times = _latency(scaling.calibration) if scaling.calibration is not None else None
    on_gpu = bool(config.prefill.gpus or config.decode.gpus)
    policy = ScalingConfig(
        prefill=_bounds(config, "prefill"),
        decode=_bounds(config, "decode"),
        level=ServiceLevel(ttft_s=config.slo.ttft_s, tpot_s=config.slo.tpot_s, percentile=scaling.percentile),
        limits=WorkerLimits(
            max_step_tokens=config.engine.max_step_tokens or (8192 if on_gpu else 256),
            max_running=config.engine.max_running or (256 if on_gpu else 64),
            headroom_tokens=config.engine.decode_headroom_tokens,
        ),
        max_gpus=scaling.max_gpus,
        role_switch=config.switches_roles,
        startup_s=scaling.startup_s,
        cold_start_s=scaling.cold_start_s,
        margin=scaling.margin,
        down_after_s=scaling.down_after_s,
        switch_after_s=scaling.down_after_s / 2,
        up_cooldown_s=scaling.up_cooldown_s,
        down_cooldown_s=scaling.down_cooldown_s,
    )
    return SloScaling(policy, times)


def _latency(path: Path) -> StepLatency:
    """Raises: ConfigError: it cannot be read, or tells of one pool alone: the other one's steps would cost nothing."""
    found = read_calibration(path)
    for kind, fit in (("prefill", found.prefill), ("decode", found.decode)):
        if fit is None:
            raise ConfigError(
                f"scaling.calibration: {path} holds no {kind} steps, wanted both kinds: calibrate a colocated worker, "
                "or with --records of one worker of each pool"
            )
    return found.latency


def replay_log(path: Path, config: ClusterConfig) -> tuple[int, Sequence[tuple[ScalingRecord, ScalingDecision]]]:
    """The number of decisions in a log, and those that the configuration's policy does not repeat.

    Raises: ConfigError: a line is no record.
    """
    with path.open(encoding="utf-8") as lines:
        records = list(read_records(lines))
    return len(records), replay(records, scaling_policy(config))


def _key(config: ClusterConfig) -> object:
    """All that the policy is made of."""
    bounds = (_bounds(config, pool) for pool in POOLS)
    return config.scaling, config.slo, config.engine, config.switches_roles, *bounds


def _bounds(config: ClusterConfig, pool: Pool) -> PoolBounds:
    fewest, most = config.bounds(pool)
    return PoolBounds(min_workers=fewest, max_workers=most, gpus_per_worker=max(1, config.pool(pool).gpus))
