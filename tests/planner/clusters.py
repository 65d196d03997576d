"""Clusters with latency models whose answers are known in advance."""

from collections.abc import Sequence
from dataclasses import dataclass

from splitserve.planner.types import ClusterSpec, PoolSpec, WorkerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearLatency:
    """Seconds per token, per sequence, per token of context and per step."""

    step_s: float = 0.0
    prefill_token_s: float = 0.0
    decode_sequence_s: float = 0.0
    decode_context_s: float = 0.0

    def prefill_step_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        return self.step_s + self.prefill_token_s * sum(new for new, _ in chunks)

    def decode_step_s(self, batch: int, context_tokens: int) -> float:
        return self.step_s + self.decode_sequence_s * batch + self.decode_context_s * context_tokens

    def mixed_step_s(self, chunks: Sequence[tuple[int, int]], batch: int, context_tokens: int) -> float:
        return self.prefill_step_s(chunks) + self.decode_step_s(batch, context_tokens) - self.step_s


LLAMA_8B = LinearLatency(step_s=0.004, prefill_token_s=2.5e-5, decode_sequence_s=2e-5, decode_context_s=3e-8)


def pool(
    latency: LinearLatency = LLAMA_8B,
    *,
    num_workers: int = 1,
    num_blocks: int = 10_000,
    max_step_tokens: int = 8192,
    max_running: int = 256,
) -> PoolSpec:
    worker = WorkerSpec(
        latency=latency,
        num_blocks=num_blocks,
        block_size=16,
        max_step_tokens=max_step_tokens,
        max_running=max_running,
    )
    return PoolSpec(worker=worker, num_workers=num_workers)


def cluster(
    prefill: PoolSpec | None,
    decode: PoolSpec,
    *,
    kv_bytes_per_token: float = 131_072.0,
    link_bytes_per_s: float = 25e9,
    link_latency_s: float = 0.0,
    router_s: float = 0.0,
    prefix_cache: bool = False,
) -> ClusterSpec:
    return ClusterSpec(
        prefill=prefill,
        decode=decode,
        kv_bytes_per_token=kv_bytes_per_token,
        link_bytes_per_s=link_bytes_per_s,
        link_latency_s=link_latency_s,
        router_s=router_s,
        prefix_cache=prefix_cache,
    )
