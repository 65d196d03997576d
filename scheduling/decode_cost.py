"""What a decode worker costs a request that joins it: slow steps, and KV that is nearly full."""

from __future__ import annotations

from .routing import DecodeLoad

FIRST_TOKENS = 32  # of the answer, that a slow decode step counts for
FULL_S = 1.0  # a full decode worker: whoever is preempted there computes its context again


def joined_step_s(load: DecodeLoad, num_tokens: int) -> float:
    """Of the worker with one sequence more, of so many tokens; 0 when unknown."""
    return load.times.decode_step_s(load.num_sequences + 1, load.context_tokens + num_tokens) if load.times else 0.0


def decode_cost_s(load: DecodeLoad, step_s: float, num_blocks: int) -> float:
    """In seconds, for a request that takes so many blocks and brings about such a step."""
    left = load.available_blocks - num_blocks
    fill = min(1.0, max(0.0, 1 - left / load.num_blocks)) if load.num_blocks else 1.0
    return FIRST_TOKENS * step_s + FULL_S * fill**4


def least_cost_s(load: DecodeLoad) -> float:
    """For any request: the cost of the smallest."""
    return decode_cost_s(load, joined_step_s(load, 0), 0)
