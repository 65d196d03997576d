"""What the planner's parts agree on: a worker's latency model, the cluster that is judged, a request, and the goal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class LatencyModel(Protocol):
    """Seconds of one engine step of one worker (a tensor-parallel group) of one pool."""

    def prefill_step_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        """One step of prompt chunks: (new tokens, tokens already in the KV cache) of each sequence."""
        ...

    def decode_step_s(self, batch: int, context_tokens: int) -> float:
        """One step that gives each of `batch` sequences a token; `context_tokens` is the sum of their contexts."""
        ...

    def mixed_step_s(self, chunks: Sequence[tuple[int, int]], batch: int, context_tokens: int) -> float:
        """One step of chunked prefill: prompt chunks beside a decode batch."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """One worker as the simulator runs it."""

    latency: LatencyModel
    num_blocks: int  # KV blocks of its pool
    block_size: int  # tokens of one
    max_step_tokens: int  # prefill tokens of a step: the chunk size
    max_running: int  # sequences in the running batch
    max_packed_tokens: int | None = None  # no further prompt joins a step with so many; None: up to max_step_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpec:
    """Equal workers of one role."""

    worker: WorkerSpec
    num_workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """A cluster to judge. `prefill` is None for a colocated one, whose `decode` workers do both."""

    prefill: PoolSpec | None
    decode: PoolSpec
    kv_bytes_per_token: float  # of the whole model, over all ranks
    link_bytes_per_s: float  # of one worker's side of the link
    link_latency_s: float  # per transfer
    router_s: float  # what router and RPCs add to a request's first token
    prefix_cache: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SimRequest:
    """One request of a trace."""

    arrival_s: float
    isl: int  # prompt tokens
    osl: int  # tokens to generate
    hash_ids: tuple[int, ...] = ()  # equal ids at equal places are equal prompt blocks
    hash_block_tokens: int = 16  # tokens of one such block
    tenant: str = ""  # whose share of the router's queue it is part of
    priority: int = 0  # higher goes first


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Limits in seconds that `percentile` of the requests must meet; None is no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    itl_s: float | None = None
    percentile: float = 90.0
