"""One running token list: its blocks, how much of its KV exists, and in which queue it is."""

from __future__ import annotations

from collections.abc import MutableSequence
from dataclasses import dataclass, field
from enum import Enum

from ..core.logprobs import TokenLogprob
from ..core.request import FinishReason, Request

PENDING = -1  # stands for an output token that a running step is still choosing


class SequenceState(Enum):
    WAITING = "waiting"  # owns nothing
    RUNNING = "running"  # owns blocks, takes part in steps
    HELD = "held"  # prefilled; keeps its blocks until they were fetched
    RESERVED = "reserved"  # its granted blocks are being filled by a transfer
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True, eq=False, weakref_slot=True)
class Sequence:
    """Mutable state of one request inside an engine."""

    request: Request
    arrival: int  # order in which they came here; a preempted sequence keeps its own
    arrived_at: float = 0.0  # when they came to a router; equal for all if nobody says
    prefill_only: bool = False
    arrived_by_transfer: bool = False
    kv_history: str = "none"  # what its KV may have lost on the way here; only sequences that accept that share it
    state: SequenceState = SequenceState.WAITING
    token_ids: MutableSequence[int]  # prompt and output
    block_table: list[int] = field(default_factory=list)
    prefix_hashes: list[bytes] = field(default_factory=list)
    num_computed: int = 0  # leading tokens whose KV is in the pool
    num_published: int = 0  # leading blocks entered into the prefix index
    num_cached: int = 0  # leading tokens found there at the last admission
    started: bool = False
    preempted: bool = False
    num_in_flight: int = 0  # planned steps that are not committed yet and use its blocks
    complete: bool = False  # a planned step yields its last token here
    released: bool = False  # over, but a planned step still uses its blocks
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # those known, from the second prompt token on
    max_num_tokens: int = field(init=False)  # prompt and the longest output

    def __post_init__(self) -> None:
        self.max_num_tokens = self.request.num_prompt_tokens + self.request.max_tokens

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        """Output tokens so far, those of earlier attempts included: the index of the next one."""
        return len(self.token_ids) - self.request.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether computing its prompt must also tell how likely that was, so that the prefix cache is of no use."""
        request = self.request
        return request.prompt_logprobs is not None and len(self.prompt_logprobs) < request.num_prompt_tokens - 1

    @property
    def is_decoding(self) -> bool:
        """Only its newest token lacks KV, and it has sampled before: one token a step from now on."""
        return self.num_uncomputed == 1 and self.num_computed >= self.request.num_tokens

    @property
    def queue_key(self) -> tuple[int, float, int]:
        """Who goes first: higher priority, then earlier arrival."""
        return (-self.request.priority, self.arrived_at, self.arrival)

    @property
    def can_run(self) -> bool:
        """Whether a further step may compute something for it."""
        return not (self.released or self.complete)

    def finish_reason(self, position: int) -> FinishReason | None:
        """Whether the output token at `position` of the token list is the last one."""
        if self.token_ids[position] in self.request.stop_token_ids:
            return FinishReason.STOP
        num_output = position + 1 - self.request.num_prompt_tokens
        return FinishReason.LENGTH if num_output >= self.request.max_tokens else None
