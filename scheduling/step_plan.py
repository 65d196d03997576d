"""A step as planned: which tokens of which sequences it computes; and the tokens that came of it."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.request import FinishReason
from .sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledTokens:
    """Tokens [start, end) of one sequence, computed in one step."""

    sequence: Sequence
    start: int
    end: int
    samples: bool  # the last known token is among them, so the step yields the next one
    index: int  # of that next one among the request's output tokens

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def prompt_targets(self) -> range:
        """Positions of prompt tokens whose likelihood this step is to tell: its logits at the one before each."""
        if not self.sequence.needs_prompt_logits:
            return range(0)
        first = max(self.start, len(self.sequence.prompt_logprobs)) + 1
        return range(first, max(first, min(self.end + 1, self.sequence.request.num_prompt_tokens)))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step: decodes first, then prefill chunks."""

    parts: tuple[ScheduledTokens, ...]
    num_decode_tokens: int
    num_prefill_tokens: int
    num_context_tokens: int  # sum over parts of tokens attended to
    started: tuple[Sequence, ...]  # in their first step
    resumed: tuple[Sequence, ...]  # in their first step after a preemption
    preempted: tuple[Sequence, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """A token that a step appended to a sequence."""

    sequence: Sequence
    index: int
    token_id: int
    finish_reason: FinishReason | None


def next_part(sequence: Sequence, budget: int) -> ScheduledTokens:
    """What one step computes of a sequence, at most `budget` tokens."""
    start = sequence.num_computed
    end = start + min(budget, sequence.num_uncomputed)
    return ScheduledTokens(
        sequence=sequence, start=start, end=end, samples=end == sequence.num_tokens, index=sequence.num_output
    )
