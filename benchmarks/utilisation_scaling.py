"""The autoscaler that everybody has: workers in proportion to a utilisation, each pool for itself."""

from __future__ import annotations

import math
from collections import deque
from typing import Literal

from ..scheduling.scaling_signals import POOLS, Pool, ScalingAction, ScalingDecision, ScalingSignals, WorkerSignal

_TOLERANCE = 0.1  # of the ratio, as Kubernetes' horizontal pod autoscaler has it


class UtilisationScaling:
    """desired = ceil(active x utilisation / target), a pool shrinking to the most desired of late. Implements
    `ScalingPolicy`.

    Args:
        decode_by: "busy" is the share of time with a kernel running, what tools call GPU utilisation; "kv" the share of
            KV memory in use. Prefill always goes by "busy".
    """

    def __init__(
        self, decode_by: Literal["busy", "kv"], *, max_workers: int, target: float = 0.7, down_after_s: float = 120.0
    ) -> None:
        self._decode_by = decode_by
        self._max_workers = max_workers
        self._target = target
        self._down_after_s = down_after_s
        self._desired: dict[Pool, deque[tuple[float, int]]] = {pool: deque() for pool in POOLS}

    def decide(self, signals: ScalingSignals) -> ScalingDecision:
        now, targets = signals.at_s, dict[Pool, int]()
        desired, actions, reasons = dict[Pool, int](), list[ScalingAction](), list[str]()
        for pool in POOLS:
            active = [w for w in signals.pool(pool) if w.state != "draining"]
            ready = [w for w in active if w.state == "ready"]
            used = sum(self._used(pool, w) for w in ready) / max(1, len(ready))
            ratio = used / self._target
            wanted = len(active) if abs(ratio - 1) <= _TOLERANCE else math.ceil(len(ready) * ratio)
            desired[pool] = min(max(1, wanted), self._max_workers)
            history = self._desired[pool]
            history.append((now, desired[pool]))
            while now - history[0][0] > self._down_after_s:
                history.popleft()
            targets[pool] = max(desired[pool], min(len(active), max(count for _, count in history)))
            leaving = sorted(active, key=lambda w: (w.state == "ready", w.num_sequences, w.worker))
            actions += [ScalingAction(kind="start", pool=pool) for _ in range(targets[pool] - len(active))]
            actions += [
                ScalingAction(kind="drain", pool=pool, worker=w.worker)
                for w in leaving[: max(0, len(active) - targets[pool])]
            ]
            reasons.append(f"{pool}: {used:.0%} of {len(ready)} workers is used, the target is {self._target:.0%}")
        return ScalingDecision(
            at_s=now, targets=targets, needed=desired, actions=tuple(actions), reasons=tuple(reasons)
        )

    def _used(self, pool: Pool, worker: WorkerSignal) -> float:
        return worker.kv_used if pool == "decode" and self._decode_by == "kv" else worker.busy
