"""One request on its way through a simulated cluster, and what the answer's reader saw of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..core.events import Event
from ..core.request import Request
from ..scheduling.dispatch_order import Awaited
from ..scheduling.fair_queue import Ticket
from .step_log import StepLog
from .types import SimRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSpan:
    """Entries [first, end) of a worker's log, through which a sequence got a token each step."""

    log: StepLog
    first: int
    end: int
    skips_first_step: bool  # of the first entry: its gap began before it and is in `gaps_s`


@dataclass(slots=True, kw_only=True, eq=False)
class RequestLife:
    """Mutable while it runs; `marks` are its life-cycle events."""

    index: int  # in the order of the caller's requests
    request: SimRequest
    work: Request  # as the schedulers take it
    ticket: Ticket  # its place in the router's queue
    predicted_ttft_s: float | None = None
    waits: bool = False  # in that queue
    awaits: Awaited | None = None  # the worker that it waits for there
    weights: str = ""  # that it is bound to: none, for all workers have the same
    marks: list[tuple[Event, float]] = field(default_factory=list)
    prefill: str | None = None  # workers of the live attempt
    decode: str = ""
    draw: int = 0  # the router's luck for it
    prefix_keys: list[int] = field(default_factory=list)  # of each full block of its prompt
    cached_tokens: Mapping[str, int] = field(default_factory=dict)  # worker -> of the prompt, by the router's index
    matched_at: int = -1  # version of the index that said so
    num_uncached: int = 0  # prompt tokens that the router takes its worker to compute
    first_token_s: float | None = None
    last_token_s: float = 0.0  # of the last token before the open span
    ended_s: float | None = None
    error: str | None = None  # code of the typed error that ended it
    num_cached: int = 0  # prompt tokens that the cache of the prefilling worker had
    num_sent: int = 0  # leading tokens whose KV the decode worker has or is being sent
    transfer_started_s: float | None = None
    transfer_finished_s: float = 0.0
    num_preemptions: int = 0
    gaps_s: list[float] = field(default_factory=list)  # between tokens that are not of consecutive steps
    spans: list[DecodeSpan] = field(default_factory=list)
    span_from: int | None = None  # entry of its worker's log where the open span begins
    span_skips_first_step: bool = False

    @property
    def request_id(self) -> str:
        return self.work.request_id

    def mark(self, event: Event, at_s: float) -> None:
        self.marks.append((event, at_s))

    def marked(self, event: Event) -> float | None:
        """When it first happened."""
        return next((at_s for what, at_s in self.marks if what is event), None)

    def open_span(self, entry: int, gap_s: float) -> None:
        """Its first token of an entry came, `gap_s` after the token before."""
        self.gaps_s.append(gap_s)
        self.span_from = entry
        self.span_skips_first_step = True

    def close_span(self, log: StepLog, at_s: float) -> None:
        """It leaves the batch after the log's last entry."""
        if self.span_from is not None:
            span = DecodeSpan(log=log, first=self.span_from, end=len(log), skips_first_step=self.span_skips_first_step)
            self.spans.append(span)
            self.span_from = None
            self.last_token_s = at_s

    def max_itl_s(self) -> float | None:
        """The longest gap between two of its tokens; None without a second token."""
        longest = [span.log.max_step_s(span.first, span.end, span.skips_first_step) for span in self.spans]
        return max([*self.gaps_s, *longest], default=None)
