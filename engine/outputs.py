"""What an engine answers: its steps, its tokens, and what it holds."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..core.errors import SplitserveError
from ..core.events import StepKind, StepRecord
from ..core.logprobs import TokenLogprob
from ..core.request import FinishReason
from ..scheduling.sequence import Sequence, SequenceState
from ..scheduling.step_plan import SampledToken, StepPlan
from ..scheduling.steps import StepScheduler
from .runner import StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Blocks that wait for a transfer; the first `num_cached_tokens` tokens are there already."""

    request_id: str
    block_ids: tuple[int, ...]
    num_cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutput:
    """One new token of one request."""

    request_id: str
    attempt: int
    index: int  # among the request's output tokens, those of earlier attempts included
    token_id: int
    finish_reason: FinishReason | None
    num_cached_tokens: int  # leading tokens that the prefix cache held when the sequence was admitted
    logprob: TokenLogprob | None = None  # if the request asked for logprobs
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # with the attempt's first token: of all prompt tokens but the first


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What one step did."""

    record: StepRecord
    tokens: list[TokenOutput]
    started: list[str]  # request ids in their first step
    preempted: list[str]
    resumed: list[str]  # in their first step after a preemption
    failed: list[tuple[str, SplitserveError]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Blocks and queues right now."""

    blocks_total: int
    blocks_free: int
    blocks_cached: int
    blocks_live: int
    blocks_granted: int
    num_running: int
    num_waiting: int
    num_held: int
    num_reserved: int
    outstanding_prefill_tokens: int

    @classmethod
    def of(cls, scheduler: StepScheduler) -> Usage:
        blocks = scheduler.blocks.counts()
        return cls(
            blocks_total=blocks.total,
            blocks_free=blocks.free,
            blocks_cached=blocks.cached,
            blocks_live=blocks.live,
            blocks_granted=blocks.granted,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_held=scheduler.num_in(SequenceState.HELD),
            num_reserved=scheduler.num_in(SequenceState.RESERVED),
            outstanding_prefill_tokens=scheduler.outstanding_prefill_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What one sequence has of the pool."""

    request_id: str
    state: str  # of scheduling/sequence.py:SequenceState
    num_blocks: int
    num_tokens: int

    @classmethod
    def of(cls, sequence: Sequence) -> Holding:
        return cls(
            request_id=sequence.request_id,
            state=sequence.state.value,
            num_blocks=len(sequence.block_table),
            num_tokens=sequence.num_tokens,
        )


def token_output(token: SampledToken, result: StepResult) -> TokenOutput:
    """What a step tells of one of its new tokens."""
    sequence = token.sequence
    first = token.index == len(sequence.request.output_token_ids)
    return TokenOutput(
        request_id=sequence.request_id,
        attempt=sequence.request.attempt,
        index=token.index,
        token_id=token.token_id,
        finish_reason=token.finish_reason,
        num_cached_tokens=sequence.num_cached,
        logprob=result.logprobs.get(sequence.request_id),
        prompt_logprobs=tuple(sequence.prompt_logprobs) if first else (),
    )


def step_record(
    scheduler: StepScheduler,
    kind: StepKind,
    *,
    step: int,
    num_sequences: int,
    began_s: float,
    ended_s: float,
    schedule_s: float = 0.0,
    plan: StepPlan | None = None,
    num_new_tokens: int = 0,
) -> StepRecord:
    """What a step was and took, and what it leaves waiting and free; without a `plan` it computed nothing."""
    return StepRecord(
        step=step,
        at_s=began_s - schedule_s,
        kind=kind,
        num_sequences=num_sequences,
        num_prefill_tokens=plan.num_prefill_tokens if plan else 0,
        num_decode_tokens=plan.num_decode_tokens if plan else 0,
        num_context_tokens=plan.num_context_tokens if plan else 0,
        num_new_tokens=num_new_tokens,
        schedule_s=schedule_s,
        run_s=ended_s - began_s,
        total_s=schedule_s + time.monotonic() - began_s,
        num_waiting=scheduler.num_waiting,
        num_free_blocks=scheduler.blocks.num_available,
    )
