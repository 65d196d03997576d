"""What the scaling policy is told: put together from members, their own words, and the routers' counts."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..core.duration_counts import NUM_BUCKETS, percentile_s
from ..proto import inference_pb2, worker_pb2
from ..scheduling.scaling_signals import Pool, ScalingSignals, TrafficSignal, WorkerSignal
from .members import Member, Phase

State = Literal["starting", "ready", "draining"]

_STATES: Mapping[Phase, State] = {
    Phase.PLACING: "starting",
    Phase.UNPLACED: "starting",
    Phase.STARTING: "starting",
    Phase.WAITING: "starting",
    Phase.SWITCHING: "starting",
    Phase.READY: "ready",
    Phase.DRAINING: "starting",  # to be restarted
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterCounts:
    """One router's counts; another boot began them anew."""

    boot_id: str
    counts: inference_pb2.TrafficCounts
    num_queued: int


@dataclass(slots=True)
class _Sum:
    """Of all routers, over the time between two looks."""

    num_arrived: int = 0
    prompt_tokens: int = 0
    prompt_tokens_squared: float = 0.0
    cached_tokens: int = 0
    num_ended: int = 0
    output_tokens: int = 0
    ttft_counts: list[int] = field(default_factory=lambda: [0] * NUM_BUCKETS)
    tpot_counts: list[int] = field(default_factory=lambda: [0] * NUM_BUCKETS)

    def add(self, now: inference_pb2.TrafficCounts, before: inference_pb2.TrafficCounts) -> None:
        self.num_arrived += now.num_arrived - before.num_arrived
        self.prompt_tokens += now.prompt_tokens - before.prompt_tokens
        self.prompt_tokens_squared += now.prompt_tokens_squared - before.prompt_tokens_squared
        self.cached_tokens += now.cached_tokens - before.cached_tokens
        self.num_ended += now.num_ended - before.num_ended
        self.output_tokens += now.output_tokens - before.output_tokens
        _add(self.ttft_counts, now.ttft_counts, before.ttft_counts)
        _add(self.tpot_counts, now.tpot_counts, before.tpot_counts)


class LoadSignals:
    """Call `gather` once for each decision."""

    def __init__(self, percentile: float) -> None:
        self._percentile = percentile
        self._gathered_at: float | None = None
        self._since: dict[str, tuple[State, float]] = {}
        self._counts: dict[str, RouterCounts] = {}

    def gather(
        self,
        now: float,
        members: Iterable[Member],
        statuses: Mapping[str, worker_pb2.GetWorkerStatusResponse],
        routers: Mapping[str, RouterCounts],
        leaving: Container[str] = (),
    ) -> ScalingSignals:
        """`statuses` by the worker's address, `routers` by name.

        Args: leaving: members that end for good; whoever else drains comes back.
        """
        members = [m for m in members if m.phase in _STATES]
        states: dict[str, State] = {m.name: "draining" if m.name in leaving else _STATES[m.phase] for m in members}
        for name, state in states.items():
            if name not in self._since or self._since[name][0] != state:
                self._since[name] = (state, now)
        self._since = {name: since for name, since in self._since.items() if name in states}
        interval_s = now - self._gathered_at if self._gathered_at is not None else 0.0
        self._gathered_at = now

        def pool(role: Pool) -> tuple[WorkerSignal, ...]:
            workers = [m for m in members if m.role == role]
            return tuple(self._worker(now, m, statuses) for m in sorted(workers, key=lambda m: m.name))

        traffic = self._traffic(interval_s, routers)
        return ScalingSignals(at_s=now, traffic=traffic, prefill=pool("prefill"), decode=pool("decode"))

    def _worker(
        self, now: float, member: Member, statuses: Mapping[str, worker_pb2.GetWorkerStatusResponse]
    ) -> WorkerSignal:
        state, since = self._since[member.name]
        answer = statuses.get(member.endpoint.address) if member.endpoint else None
        if answer is None:
            return WorkerSignal(worker=member.name, state=state, state_s=now - since)
        status = answer.status
        available = status.num_free_blocks + status.num_cached_blocks
        return WorkerSignal(
            worker=member.name,
            state=state,
            state_s=now - since,
            num_sequences=status.num_running + status.num_waiting + status.num_held,
            queued_prefill_tokens=status.num_outstanding_prefill_tokens,
            prefill_tokens_per_s=status.prefill_tokens_per_s,
            decode_step_s=status.decode_step_s,
            kv_used=1 - available / status.num_blocks if status.num_blocks else 0.0,
            kv_tokens=status.num_blocks * answer.info.block_size,
        )

    def _traffic(self, interval_s: float, routers: Mapping[str, RouterCounts]) -> TrafficSignal:
        total = _Sum()
        for name, router in routers.items():
            before = self._counts.get(name)
            if before is None:  # what it counted before it was first seen is of no known time
                continue
            restarted = before.boot_id != router.boot_id
            total.add(router.counts, inference_pb2.TrafficCounts() if restarted else before.counts)
        self._counts = {**self._counts, **routers}
        return TrafficSignal(
            interval_s=interval_s,
            num_arrived=total.num_arrived,
            prefill_tokens=max(0, total.prompt_tokens - total.cached_tokens),
            prefill_tokens_squared=total.prompt_tokens_squared,
            cached_tokens=total.cached_tokens,
            num_ended=total.num_ended,
            output_tokens=total.output_tokens,
            num_queued=sum(router.num_queued for router in routers.values()),
            queued_prefill_tokens=sum(router.counts.queued_prompt_tokens for router in routers.values()),
            ttft_s=percentile_s(total.ttft_counts, self._percentile),
            tpot_s=percentile_s(total.tpot_counts, self._percentile),
        )


def _add(total: list[int], now: Sequence[int], before: Sequence[int]) -> None:
    for bucket, count in enumerate(now):
        total[bucket] += count - (before[bucket] if before else 0)
