"""What an engine answers: its steps, its tokens, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import SplitserveError
from ..core.events import StepRecord
from ..core.logprobs import TokenLogprob
from ..core.request import FinishReason
from ..scheduling.steps import SampledToken
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What one sequence has of the pool."""

    request_id: str
    state: str  # of scheduling/sequence.py:SequenceState
    num_blocks: int
    num_tokens: int


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
