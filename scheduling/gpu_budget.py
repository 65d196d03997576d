"""Two pools under one budget of GPUs: what each gets, settled together, and the actions that lead there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .scaling_signals import POOLS, Pool, ScalingAction, WorkerSignal


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolBounds:
    """What the configuration allows a pool."""

    min_workers: int = 1
    max_workers: int = 64
    gpus_per_worker: int = 1  # on CPUs, a worker counts as one

    def clip(self, workers: int) -> int:
        return min(max(workers, self.min_workers), self.max_workers)


def other(pool: Pool) -> Pool:
    return "decode" if pool == "prefill" else "prefill"


def num_gpus(workers: Mapping[Pool, int], bounds: Mapping[Pool, PoolBounds]) -> int:
    return sum(workers[pool] * bounds[pool].gpus_per_worker for pool in POOLS)


def share(
    steady: Mapping[Pool, int], wants: Mapping[Pool, int], bounds: Mapping[Pool, PoolBounds], max_gpus: int | None
) -> dict[Pool, int]:
    """The wants, or as much of both as fits: first of what each needs all the time, then of what a backlog adds.

    Worker by worker to the pool that has the smaller part of its want: a request passes through both pools, so that one
    limits it. A backlog comes second because it says where requests wait, not for how long they would if all were well.
    """
    if max_gpus is None or num_gpus(wants, bounds) <= max_gpus:
        return dict(wants)
    shared = {pool: min(bounds[pool].min_workers, wants[pool]) for pool in POOLS}
    for most in ({pool: min(steady[pool], wants[pool]) for pool in POOLS}, wants):
        while True:
            free = max_gpus - num_gpus(shared, bounds)
            short = [p for p in POOLS if shared[p] < most[p] and bounds[p].gpus_per_worker <= free]
            if not short:
                break
            shared[min(short, key=lambda p: shared[p] / most[p])] += 1
    return shared


def actions_for(
    targets: Mapping[Pool, int],
    workers: Mapping[Pool, Sequence[WorkerSignal]],
    bounds: Mapping[Pool, PoolBounds],
    *,
    max_gpus: int | None,
    role_switch: bool,
) -> list[ScalingAction]:
    """From what is there to the targets: switches where one pool gives what the other lacks, then drains, then starts.

    Starts take only GPUs that nobody holds now: those of a draining worker are free once it has ended.
    """
    active = {pool: [w for w in workers[pool] if w.state != "draining"] for pool in POOLS}
    change = {pool: targets[pool] - len(active[pool]) for pool in POOLS}
    actions: list[ScalingAction] = []
    for pool in POOLS:
        leaving = _in_order_of_leaving(active[pool])
        if role_switch and bounds["prefill"].gpus_per_worker == bounds["decode"].gpus_per_worker:
            settled = [w for w in leaving if w.state == "ready"]
            for worker in settled[: max(0, min(-change[pool], change[other(pool)]))]:
                actions.append(ScalingAction(kind="switch", pool=pool, worker=worker.worker, to_pool=other(pool)))
                leaving.remove(worker)
                change[pool] += 1
                change[other(pool)] -= 1
        actions += [
            ScalingAction(kind="drain", pool=pool, worker=worker.worker) for worker in leaving[: max(0, -change[pool])]
        ]
    held = num_gpus({pool: len(workers[pool]) for pool in POOLS}, bounds)
    starts = dict.fromkeys(POOLS, 0)
    while wanting := [
        pool
        for pool in POOLS
        if starts[pool] < change[pool] and (max_gpus is None or held + bounds[pool].gpus_per_worker <= max_gpus)
    ]:
        pool = min(wanting, key=lambda p: (len(active[p]) + starts[p]) / targets[p])
        starts[pool] += 1
        held += bounds[pool].gpus_per_worker
    actions += [ScalingAction(kind="start", pool=pool) for pool in POOLS for _ in range(starts[pool])]
    return actions


def _in_order_of_leaving(workers: Sequence[WorkerSignal]) -> list[WorkerSignal]:
    """Those that do not serve yet, the youngest first, then those with the least to finish."""
    return sorted(
        workers,
        key=lambda w: (
            w.state == "ready",
            w.state_s if w.state == "starting" else 0.0,
            w.num_sequences,
            w.queued_prefill_tokens,
            w.worker,
        ),
    )
