"""Runs of decode steps that are known beforehand: how long the same sequences go on, and what that takes."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from ..core.kv_geometry import blocks_for
from .blocks import BlockAllocator
from .sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRun:
    """Decode steps with the same sequences: from one to the next only their contexts grow, each by a token."""

    num_steps: int  # the last one ends a sequence, or is the last that there are blocks for
    batch: int  # sequences
    num_context_tokens: int  # sum over them of tokens attended to in the first step
    num_new_blocks: int  # that all its steps take at most
    started: tuple[Sequence, ...]  # in their first step


def foresee_run(running: list[Sequence], blocks: BlockAllocator) -> DecodeRun | None:
    """The run that comes next if nobody joins or leaves those that are running; None: their next step begins none."""
    num_steps = num_context_tokens = 0
    started: list[Sequence] = []
    for sequence in running:
        request, num_tokens = sequence.request, len(sequence.token_ids)
        left = sequence.max_num_tokens - num_tokens
        if num_tokens - sequence.num_computed != 1 or left == request.max_tokens or request.stop_token_ids:
            return None  # a prefill, a first token, or an end that nobody can foresee
        if not num_steps or left < num_steps:
            num_steps = left
        num_context_tokens += num_tokens
        if not sequence.started:
            started.append(sequence)
    size, num_available = blocks.block_size, blocks.num_available
    num_blocks = len(running) * blocks_for(num_steps, size)
    if num_blocks > num_available:  # it may still do, so count
        num_steps = bisect_right(
            range(1, num_steps + 1), num_available, key=lambda steps: _blocks_of_run(running, steps, size)
        )
        num_blocks = _blocks_of_run(running, num_steps, size)
    if num_steps == 0:
        return None  # somebody is preempted
    return DecodeRun(
        num_steps=num_steps,
        batch=len(running),
        num_context_tokens=num_context_tokens,
        num_new_blocks=num_blocks,
        started=tuple(started),
    )


def _blocks_of_run(running: list[Sequence], num_steps: int, block_size: int) -> int:
    """Blocks that the sequences take for that many decode steps."""
    return sum(max(0, blocks_for(s.num_computed + num_steps, block_size) - len(s.block_table)) for s in running)
