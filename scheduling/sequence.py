"""One running token list: its blocks, how much of its KV exists, and in which queue it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ..core.request import FinishReason, Request


class SequenceState(Enum):
    WAITING = "waiting"  # owns nothing
    RUNNING = "running"  # owns blocks, takes part in steps
    HELD = "held"  # prefilled; keeps its blocks until they were fetched
    RESERVED = "reserved"  # its granted blocks are being filled by a transfer
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """Mutable state of one request inside an engine."""

    request: Request
    arrival: int  # order of arrival; a preempted sequence keeps its own
    prefill_only: bool = False
    arrived_by_transfer: bool = False
    state: SequenceState = SequenceState.WAITING
    token_ids: list[int] = field(default_factory=list)  # prompt and output
    block_table: list[int] = field(default_factory=list)
    prefix_hashes: list[bytes] = field(default_factory=list)
    num_computed: int = 0  # leading tokens whose KV is in the pool
    num_published: int = 0  # leading blocks entered into the prefix index
    num_cached: int = 0  # leading tokens found there at the last admission
    started: bool = False
    preempted: bool = False
    released: bool = False  # cancelled while a step was using its blocks

    def __post_init__(self) -> None:
        self.token_ids = [*self.request.prompt_token_ids, *self.request.output_token_ids]

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
    def is_decoding(self) -> bool:
        """Only its newest token lacks KV, and it has sampled before: one token a step from now on."""
        return self.num_uncomputed == 1 and self.num_computed > 0

    @property
    def queue_key(self) -> tuple[int, int]:
        """Who goes first: higher priority, then earlier arrival."""
        return (-self.request.priority, self.arrival)

    def finish_reason(self) -> FinishReason | None:
        """Whether the newest output token is the last one."""
        if self.token_ids[-1] in self.request.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_output >= self.request.max_tokens else None
