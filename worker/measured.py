"""What a worker measures of itself: its metrics, and the moving averages that its status tells."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.metrics import WorkerMetrics
from ..engine.engine import Engine
from ..engine.outputs import StepOutput
from .device import THROTTLE_REASONS, DeviceState
from .options import Role

_RATE_WEIGHT = 0.2  # of the newest step in the moving averages


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counts:
    """The engine's counters as of the last step that the metrics know of."""

    prompt_tokens: int
    cached_tokens: int
    recomputed_prompt_tokens: int

    @classmethod
    def of(cls, engine: Engine) -> _Counts:
        return cls(
            prompt_tokens=engine.prompt_tokens,
            cached_tokens=engine.cached_tokens,
            recomputed_prompt_tokens=engine.recomputed_prompt_tokens,
        )


class Measured:
    """Of one engine, on the event loop. Averages are 0 before there were two steps of their kind: the first one also
    loads what it needs, and whoever is thought to be that slow gets no work to show otherwise."""

    def __init__(self, engine: Engine, metrics: WorkerMetrics) -> None:
        self.decode_step_s = self.decode_batch = 0.0
        self._prefill_tokens = self._prefill_s = 0.0  # of a step
        self._is_cold = {"prefill": True, "decode": True}
        self._engine = engine
        self.publish_in(metrics)

    def publish_in(self, metrics: WorkerMetrics) -> None:
        """From now on; counters begin at 0. Gauges are read when they are scraped, so they are never stale."""
        engine = self._engine
        self._metrics = metrics
        self._told = _Counts.of(engine)
        metrics.blocks_total.set_function(lambda: engine.usage().blocks_total)
        metrics.blocks_free.set_function(lambda: engine.usage().blocks_free)
        metrics.blocks_cached.set_function(lambda: engine.usage().blocks_cached)
        metrics.blocks_live.set_function(lambda: engine.usage().blocks_live)
        metrics.blocks_granted.set_function(lambda: engine.usage().blocks_granted)
        metrics.blocks_orphaned.set_function(engine.num_orphaned_blocks)
        metrics.running.set_function(lambda: engine.usage().num_running)
        metrics.waiting.set_function(lambda: engine.usage().num_waiting)
        metrics.held.set_function(lambda: engine.usage().num_held)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Of many tokens in few steps: a mean of speeds would be that of short prompts."""
        return self._prefill_tokens / self._prefill_s if self._prefill_s else 0.0

    def step(self, output: StepOutput, role: Role) -> None:
        """Count a step that has ended."""
        record, metrics = output.record, self._metrics
        metrics.steps.inc()
        metrics.step_seconds.observe(record.total_s)
        metrics.output_tokens.inc(record.num_new_tokens)
        metrics.preemptions.inc(len(output.preempted))
        engine, told = self._engine, self._told
        metrics.prompt_tokens.inc(engine.prompt_tokens - told.prompt_tokens)
        metrics.cached_tokens.inc(engine.cached_tokens - told.cached_tokens)
        metrics.recomputed_prompt_tokens.inc(engine.recomputed_prompt_tokens - told.recomputed_prompt_tokens)
        self._told = _Counts.of(engine)
        if self._was_cold("decode" if record.kind == "decode" else "prefill"):
            return
        if record.kind == "prefill":
            self._prefilled(record.num_prefill_tokens, record.total_s)
        elif record.kind == "decode":
            self.decode_step_s = _average(self.decode_step_s, record.total_s)
            self.decode_batch = _average(self.decode_batch, record.num_sequences)
        elif role != "prefill" and self.decode_step_s and record.num_prefill_tokens:
            # What a prompt adds to a decode step: a busy worker never computes one alone. Below a tenth of the step
            # the difference is noise.
            prefill_s = max(record.total_s - self.decode_step_s, 0.1 * self.decode_step_s)
            self._prefilled(record.num_prefill_tokens, prefill_s)

    def _was_cold(self, kind: str) -> bool:
        was_cold, self._is_cold[kind] = self._is_cold[kind], False
        return was_cold

    def _prefilled(self, num_tokens: int, seconds: float) -> None:
        self._prefill_tokens = _average(self._prefill_tokens, num_tokens)
        self._prefill_s = _average(self._prefill_s, seconds)

    def device(self, state: DeviceState) -> None:
        """Publish how a device fares."""
        metrics = self._metrics
        metrics.gpu_memory_used.labels(state.uuid).set(state.memory_used_bytes)
        metrics.gpu_memory_total.labels(state.uuid).set(state.memory_total_bytes)
        metrics.gpu_temperature.labels(state.uuid).set(state.temperature_c)
        metrics.gpu_power.labels(state.uuid).set(state.power_w)
        metrics.gpu_sm_clock.labels(state.uuid).set(state.sm_clock_mhz * 1e6)
        metrics.gpu_ecc_errors.labels(state.uuid, "corrected").set(state.corrected_errors)
        metrics.gpu_ecc_errors.labels(state.uuid, "uncorrected").set(state.uncorrected_errors)
        metrics.gpu_nvlinks_up.labels(state.uuid).set(state.nvlinks_up)
        for reason in THROTTLE_REASONS.values():
            metrics.gpu_throttled.labels(state.uuid, reason).set(reason in state.throttle_reasons)


def _average(old: float, new: float) -> float:
    return new if old == 0.0 else old + _RATE_WEIGHT * (new - old)
