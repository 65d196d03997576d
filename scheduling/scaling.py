"""How many prefill and decode workers there should be: forecast, need, hysteresis, one budget. Time is an argument.

Each decision, in order:
1. Traffic is forecast as far ahead as a worker takes to start (`traffic_forecast.py`).
2. Prefill needs what keeps its queue within the TTFT slack; decode what holds the KV and meets TPOT (`pool_needs.py`).
   Queued seconds and used KV raise this; service levels that are missed although the model is content correct it.
3. A pool grows at once. It shrinks only to the most it needed, with a margin, over a while, and never soon after a
   change (hysteresis and cool-down).
4. Both pools' wants are settled together under the GPU budget, a worker that one pool can spare going to the other
   (`gpu_budget.py`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .gpu_budget import PoolBounds, actions_for, num_gpus, other, share
from .pool_needs import (
    MeasuredSteps,
    StepTimes,
    decode_batch,
    decode_workers,
    prefill_workers,
    prompt_cost,
)
from .scaling_config import ScalingConfig
from .scaling_signals import POOLS, Pool, ScalingDecision, ScalingSignals, WorkerSignal
from .traffic_forecast import TrafficForecast

_MAX_CORRECTION = 2.0  # of a need, by service levels that were missed
_CORRECTION = 1.2  # one of these
_PATIENCE = 3  # intervals in a row that miss it before a need is corrected


@dataclass(frozen=True, slots=True, kw_only=True)
class _Need:
    """Of one pool."""

    steady: int  # to serve the forecast
    workers: int  # and to clear what is queued
    keep: int  # the same, with the margin
    reason: str


@dataclass(slots=True)
class _Memory:
    """What the policy remembers of one pool."""

    keeps: deque[tuple[float, int]] = field(default_factory=deque)  # (when, workers worth keeping)
    changed_at: float = -math.inf
    grown_at: float = -math.inf
    correction: float = 1.0
    num_missed: int = 0  # intervals in a row in which the service level was missed and nobody else is to blame

    def remember(self, now: float, keep: int, for_s: float) -> None:
        self.keeps.append((now, keep))
        while len(self.keeps) > 1 and now - self.keeps[1][0] >= for_s:  # one that old tells that it was watched so long
            self.keeps.popleft()

    def most_kept(self, now: float, within_s: float) -> int | None:
        """The most that was worth keeping; None before it was watched for so long."""
        if not self.keeps or now - self.keeps[0][0] < within_s:
            return None
        return max(keep for at, keep in self.keeps if now - at <= within_s)


class SloScaling:
    """Sizes both pools by service levels. The same signals in the same order give the same decisions.

    A new one, after a restart of the controller, only grows pools until it has watched them for `down_after_s`.

    Args:
        times: the planner's latency model; None: what the workers themselves measured.
    """

    def __init__(self, config: ScalingConfig, times: StepTimes | None) -> None:
        self.config = config
        self._times = times
        self._traffic = TrafficForecast()
        self._measured = MeasuredSteps(prefill_tokens_per_s=0.0, step_s=0.0, batch=1.0)
        self._memory: dict[Pool, _Memory] = {pool: _Memory() for pool in POOLS}
        self._before_s: float | None = None

    def decide(self, signals: ScalingSignals) -> ScalingDecision:
        now, elapsed_s = signals.at_s, signals.at_s - (self._before_s if self._before_s is not None else signals.at_s)
        self._before_s = now
        self._observe(signals, elapsed_s)
        needs: dict[Pool, _Need] = {"prefill": self._prefill_need(signals), "decode": self._decode_need(signals)}
        for pool in POOLS:
            needs[pool] = self._corrected(pool, needs[pool], signals, elapsed_s)
            self._memory[pool].remember(now, needs[pool].keep, self.config.down_after_s)
        return self._settle(signals, needs)

    # --- what is known ---

    def _observe(self, signals: ScalingSignals, elapsed_s: float) -> None:
        self._traffic.observe(signals.traffic, elapsed_s)
        prefills = [w for w in self._warm(signals.prefill) if w.prefill_tokens_per_s > 0]
        decodes = [w for w in self._warm(signals.decode) if w.decode_step_s > 0 and w.num_sequences]
        if prefills:
            rate = sum(w.prefill_tokens_per_s for w in prefills) / len(prefills)
            self._measured = replace(self._measured, prefill_tokens_per_s=rate)
        if decodes:
            self._measured = replace(
                self._measured,
                step_s=sum(w.decode_step_s for w in decodes) / len(decodes),
                batch=sum(w.num_sequences for w in decodes) / len(decodes),
            )

    def _warm(self, workers: tuple[WorkerSignal, ...]) -> list[WorkerSignal]:
        return [w for w in workers if w.state == "ready" and w.state_s >= self.config.cold_start_s]

    # --- what is needed ---

    def _prefill_need(self, signals: ScalingSignals) -> _Need:
        config, active = self.config, _active(signals.prefill)
        times: StepTimes | None = self._times or (self._measured if self._measured.prefill_tokens_per_s > 0 else None)
        if times is None:
            reason = "no latency model, and no prefill speed measured yet"
            return _Need(steady=active, workers=active, keep=active, reason=reason)
        demand = self._traffic.demand(config.startup_s)
        if demand is None:
            return _Need(steady=0, workers=0, keep=0, reason="no prompt has arrived")
        queued_tokens = sum(w.queued_prefill_tokens for w in signals.prefill)
        if not self._decode_is_full(signals):  # otherwise that is what they wait for
            queued_tokens += signals.traffic.queued_prefill_tokens
        cost = prompt_cost(demand, times, config.limits)
        backlog_s = queued_tokens * cost.mean_s / demand.prefill_tokens if demand.prefill_tokens else 0.0
        backlog_s = max(0.0, backlog_s - active * cost.mean_s)  # what is being computed is none
        more = replace(demand, requests_per_s=demand.requests_per_s * (1 + config.margin))
        steady, keep = (
            prefill_workers(load, cost, config.level, max_utilisation=config.max_utilisation) for load in (demand, more)
        )
        offered = demand.requests_per_s * cost.mean_s
        reason = (
            f"{demand.requests_per_s:,.1f} prompts/s of {demand.prefill_tokens:,.0f} tokens are {offered:.1f} s of "
            f"prefill a second, {backlog_s:.1f} s are queued"
        )
        if config.level.ttft_s is not None:
            reason += f", one may wait {config.level.ttft_s - cost.mean_s:.2f} s"
        behind = math.ceil((offered + backlog_s / config.recover_s) / config.max_utilisation - 1e-9)
        return _need(steady, behind, keep, reason)

    def _decode_need(self, signals: ScalingSignals) -> _Need:
        config, active = self.config, _active(signals.decode)
        ready = [w for w in signals.decode if w.state == "ready"]
        is_full = self._decode_is_full(signals)
        demand = self._traffic.demand(config.startup_s)
        held = sum(w.kv_used for w in ready)  # in workers; a sum, so that those that just came do not dilute it
        sizes = [w.kv_tokens for w in ready if w.kv_tokens]
        kv_tokens = sum(sizes) // len(sizes) if sizes else 0
        waiting = 0.0
        if demand is not None and kv_tokens and is_full:
            waiting = signals.traffic.num_queued * demand.context_tokens / kv_tokens
        reason = f"KV of {held:.1f} workers is used" + (f", of {waiting:.1f} more is waited for" if waiting else "")
        steady = math.ceil(held / config.max_kv_used - 1e-9)
        keep = math.ceil(held / config.max_kv_used * (1 + config.margin) - 1e-9)
        behind = math.ceil((held + waiting) / config.max_kv_used - 1e-9)
        if is_full:  # of batches as much as of KV
            num_sequences = sum(w.num_sequences for w in ready) + signals.traffic.num_queued
            behind = max(behind, math.ceil(num_sequences / config.limits.max_running))
        times: StepTimes | None = self._times or (self._measured if self._measured.step_s > 0 else None)
        if times is None or demand is None or not self._traffic.knows_output:
            reason += "; no latency model or answer lengths yet"
            return _need(steady, behind, max(keep, active), reason)
        batch = decode_batch(
            demand,
            times,
            config.level,
            config.limits,
            kv_tokens=kv_tokens,
            max_kv_used=config.max_kv_used,
            tpot_margin=config.tpot_margin,
        )
        more = replace(demand, requests_per_s=demand.requests_per_s * (1 + config.margin))
        steady, keep = max(steady, decode_workers(demand, batch)), max(keep, decode_workers(more, batch))
        tokens_per_s = demand.requests_per_s * max(0.0, demand.output_tokens - 1)
        reason = (
            f"{tokens_per_s:,.0f} tokens/s are to be made, a worker makes {batch.tokens_per_s:,.0f} in batches of "
            f"{batch.sequences:.0f} (bound by {batch.bound}); {reason}"
        )
        return _need(steady, behind, keep, reason)

    def _decode_is_full(self, signals: ScalingSignals) -> bool:
        """Its KV or its batches are, so that prompts wait in the routers for room there."""
        ready = [w for w in signals.decode if w.state == "ready"]
        most = self.config.max_kv_used * len(ready)
        sequences = sum(w.num_sequences for w in ready) / self.config.limits.max_running
        return bool(ready) and (sum(w.kv_used for w in ready) >= most or sequences >= most)

    def _corrected(self, pool: Pool, need: _Need, signals: ScalingSignals, elapsed_s: float) -> _Need:
        """What the model did not foresee: a service level missed by a pool that has what it is said to need."""
        memory, workers = self._memory[pool], signals.pool(pool)
        memory.correction = 1 + (memory.correction - 1) * math.exp(-elapsed_s / self.config.correction_s)
        limit_s, got_s = self.config.level.ttft_s, signals.traffic.ttft_s
        if pool == "decode":
            limit_s, got_s = self.config.level.tpot_s, signals.traffic.tpot_s
        missed = limit_s is not None and got_s is not None and got_s > limit_s
        blamed = missed and not (pool == "prefill" and self._decode_is_full(signals))
        active, reason = _active(workers), need.reason
        enough = len(self._warm(workers)) == active >= need.workers > 0
        memory.num_missed = memory.num_missed + 1 if blamed and enough else 0
        if memory.num_missed == _PATIENCE:  # a first one may be of requests that waited before the pool had grown
            memory.num_missed = 0
            memory.correction = min(_MAX_CORRECTION, memory.correction * _CORRECTION)
        if memory.correction > 1.01 and need.workers:
            reason += f"; x {memory.correction:.2f}, since its service level was missed with what the model asked for"
        steady, wanted, keep = (
            math.ceil(count * memory.correction - 1e-9) for count in (need.steady, need.workers, need.keep)
        )
        return _Need(steady=steady, workers=wanted, keep=max(keep, active) if blamed else keep, reason=reason)

    # --- what is done ---

    def _settle(self, signals: ScalingSignals, needs: Mapping[Pool, _Need]) -> ScalingDecision:
        config, bounds, now = self.config, self.config.bounds(), signals.at_s
        active = {pool: _active(signals.pool(pool)) for pool in POOLS}
        wants = {pool: self._want(pool, active[pool], needs[pool], now) for pool in POOLS}
        if config.role_switch and config.prefill.gpus_per_worker == config.decode.gpus_per_worker:
            for pool in POOLS:
                if wants[pool] > active[pool]:
                    spare = self._spare(other(pool), wants[other(pool)], now)
                    wants[other(pool)] -= min(spare, wants[pool] - active[pool])
        targets = self._within_budget(wants, active, needs, now)
        actions = actions_for(
            targets,
            {pool: signals.pool(pool) for pool in POOLS},
            bounds,
            max_gpus=config.max_gpus,
            role_switch=config.role_switch,
        )
        for pool in POOLS:
            if any(pool in (action.pool, action.to_pool) for action in actions):
                self._memory[pool].changed_at = now
            if any(pool == (action.to_pool or action.pool) and action.kind != "drain" for action in actions):
                self._memory[pool].grown_at = now
        return ScalingDecision(
            at_s=now,
            targets=targets,
            needed={pool: needs[pool].workers for pool in POOLS},
            actions=tuple(actions),
            reasons=tuple(
                _reason(pool, active[pool], targets[pool], wants[pool], needs[pool], bounds[pool]) for pool in POOLS
            ),
        )

    def _want(self, pool: Pool, active: int, need: _Need, now: float) -> int:
        """Growth at once, shrinking with hysteresis; within the pool's bounds."""
        config, memory, bounds = self.config, self._memory[pool], self.config.bounds()[pool]
        if active < bounds.min_workers or active > bounds.max_workers:
            return bounds.clip(max(active, need.workers))
        if need.workers > active:
            return bounds.clip(need.workers) if now - memory.grown_at >= config.up_cooldown_s else active
        kept = memory.most_kept(now, config.down_after_s)
        if kept is None or kept >= active or now - memory.changed_at < config.down_cooldown_s:
            return active
        step = max(1, math.floor(active * config.max_down_share))
        return bounds.clip(max(kept, active - step))

    def _spare(self, pool: Pool, want: int, now: float) -> int:
        """Workers that the pool can give to the other one."""
        memory = self._memory[pool]
        kept = memory.most_kept(now, self.config.switch_after_s)
        if kept is None or now - memory.changed_at < self.config.switch_after_s:
            return 0
        return max(0, want - self.config.bounds()[pool].clip(kept))

    def _within_budget(
        self, wants: Mapping[Pool, int], active: Mapping[Pool, int], needs: Mapping[Pool, _Need], now: float
    ) -> dict[Pool, int]:
        """The budget shared out. A pool that lacks workers gives some up only where the other is clearly worse off, a
        part at a time and with the cool-down of shrinking.
        """
        config, bounds, most = self.config, self.config.bounds(), self.config.max_gpus
        steady = {pool: bounds[pool].clip(needs[pool].steady) for pool in POOLS}
        targets = share(steady, wants, bounds, most)
        for pool in POOLS:
            if most is None or not targets[pool] < active[pool] <= wants[pool] or num_gpus(active, bounds) > most:
                continue
            parts = {p: active[p] / max(1, min(steady[p], wants[p])) for p in POOLS}
            step = max(1, math.floor(active[pool] * config.max_down_share))
            if parts[pool] - parts[other(pool)] < config.margin:
                step = 0
            if now - self._memory[pool].changed_at < config.down_cooldown_s:
                step = 0
            least = max(targets[pool], active[pool] - step)
            room = (most - least * bounds[pool].gpus_per_worker) // bounds[other(pool)].gpus_per_worker
            return {**targets, pool: least, other(pool): min(wants[other(pool)], room)}
        return targets


def _need(steady: int, behind: int, keep: int, reason: str) -> _Need:
    """A backlog asks for as much again as the forecast at most: it is gone before more would have started."""
    workers = max(steady, min(behind, 2 * max(1, steady)))
    return _Need(steady=steady, workers=workers, keep=max(workers, keep), reason=reason)


def _active(workers: tuple[WorkerSignal, ...]) -> int:
    return sum(w.state != "draining" for w in workers)


def _reason(pool: Pool, active: int, target: int, want: int, need: _Need, bounds: PoolBounds) -> str:
    change = f"{active} -> {target}" if target != active else f"stays at {active}"
    limits = []
    if want != need.workers and bounds.clip(need.workers) != need.workers:
        limits.append(f"bounds are {bounds.min_workers} to {bounds.max_workers}")
    if target < want:
        limits.append(f"the GPU budget allows no more of the {want} wanted")
    elif target == active and need.workers < active and not limits:
        limits.append("it shrinks after a while below")
    elif target < active and target < need.workers:
        limits.append("the other pool lacks more")
    needs = f"needs {need.workers}" + (f" ({'; '.join(limits)})" if limits else "")
    return f"{pool} {change}, {needs}: {need.reason}"
