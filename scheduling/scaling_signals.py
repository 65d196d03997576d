"""What a scaling decision is made of and what it says: plain figures in, actions with reasons out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Pool = Literal["prefill", "decode"]
POOLS: tuple[Pool, Pool] = ("prefill", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSignal:
    """One worker as it was last heard.

    Every worker that holds a GPU is listed, in one pool. What will serve without a further decision is "starting": a
    worker that loads, one that is placed again after its death, and, in its new pool, one that changes its role, from
    the decision on.
    """

    worker: str  # its name
    state: Literal["starting", "ready", "draining"]
    state_s: float  # since it is in this state
    num_sequences: int = 0  # running, waiting or held
    queued_prefill_tokens: int = 0  # accepted and not computed
    prefill_tokens_per_s: float = 0.0  # of late; 0 when unknown
    decode_step_s: float = 0.0  # a recent decode step; 0 when unknown
    kv_used: float = 0.0  # share of its KV blocks that live sequences and grants hold
    kv_tokens: int = 0  # that its whole KV pool has room for
    busy: float = 0.0  # share of the interval that it spent in engine steps; says little of a decode worker


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficSignal:
    """Requests at all routers together. What arrived, refused ones included, and what ended is counted over the last
    `interval_s`.
    """

    interval_s: float
    num_arrived: int
    prefill_tokens: int  # prompt tokens that arrived and that no cache holds
    prefill_tokens_squared: float = 0.0  # sum of the squares of these, prompt by prompt; 0 when unknown
    cached_tokens: int = 0  # the other prompt tokens that arrived
    num_ended: int = 0
    output_tokens: int = 0  # of the answers that ended
    num_queued: int = 0  # waiting in a router for dispatch, now
    queued_prefill_tokens: int = 0  # of these
    ttft_s: float | None = None  # at the service level's percentile, over the interval; None: no first token
    tpot_s: float | None = None  # the same


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingSignals:
    """The cluster at one moment."""

    at_s: float  # on any clock that never goes back
    traffic: TrafficSignal
    prefill: tuple[WorkerSignal, ...]
    decode: tuple[WorkerSignal, ...]

    def pool(self, pool: Pool) -> tuple[WorkerSignal, ...]:
        return self.prefill if pool == "prefill" else self.decode

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> ScalingSignals:
        return cls(
            at_s=row["at_s"],
            traffic=TrafficSignal(**row["traffic"]),
            prefill=tuple(WorkerSignal(**worker) for worker in row["prefill"]),
            decode=tuple(WorkerSignal(**worker) for worker in row["decode"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingAction:
    """One thing to do. A "start" adds a worker to `pool`; "drain" lets `worker` finish what it has, then ends it;
    "switch" lets it finish, then gives it the role `to_pool` without a reload.
    """

    kind: Literal["start", "drain", "switch"]
    pool: Pool
    worker: str = ""  # empty for a start
    to_pool: Pool | None = None  # of a switch


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingDecision:
    """Targets once the actions are done, what to do, and why."""

    at_s: float
    targets: dict[Pool, int] = field(hash=False)  # workers that serve or start, without those that drain
    needed: dict[Pool, int] = field(hash=False)  # what each pool asked for, before bounds and budget
    actions: tuple[ScalingAction, ...] = ()
    reasons: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> ScalingDecision:
        return cls(
            at_s=row["at_s"],
            targets=dict(row["targets"]),
            needed=dict(row["needed"]),
            actions=tuple(ScalingAction(**action) for action in row["actions"]),
            reasons=tuple(row["reasons"]),
        )
