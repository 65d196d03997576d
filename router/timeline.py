"""When what happened to one request, by the router's clock, and what the workers measured themselves."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.events import Event, Recorder
from .session import DecodeReport, PrefillReport, TransferReport


@dataclass(slots=True, kw_only=True)
class Timeline:
    """Stamps of one request (monotonic seconds; None: did not happen) and the reports of its last attempt."""

    request_id: str
    arrived_at: float
    recorder: Recorder
    events: list[tuple[Event, float]] = field(default_factory=list)
    dispatched_at: float | None = None  # first attempt
    asked_at: float | None = None  # last attempt: grant asked for
    granted_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    ended_at: float | None = None
    decoding: bool = False
    prefill: PrefillReport | None = None
    transfer: TransferReport | None = None
    decode: DecodeReport | None = None
    prefill_worker: str = ""
    decode_worker: str = ""

    def mark(self, event: Event, at_s: float, attempt: int = 1, **detail: str | int | float) -> None:
        self.events.append((event, at_s))
        self.recorder.event(self.request_id, event, attempt=attempt, at_s=at_s, **detail)

    def dispatched(self, at_s: float, prefill_worker: str, decode_worker: str) -> None:
        """An attempt begins: what is known of earlier ones no longer describes the answer."""
        if self.dispatched_at is None:
            self.dispatched_at = at_s
        self.asked_at = at_s if prefill_worker else None
        self.granted_at = None
        self.decoding = False
        self.prefill = self.transfer = self.decode = None
        self.prefill_worker, self.decode_worker = prefill_worker, decode_worker

    def in_order(self) -> list[tuple[Event, float]]:
        """The events, with those that only workers saw placed by what they measured."""
        events = list(self.events)
        for event, at_s in self.events:
            if event is Event.FIRST_TOKEN and self.prefill is not None:
                events.append((Event.PREFILL_STARTED, at_s - self.prefill.prefill_s))
            if event is Event.TRANSFER_FINISHED and self.transfer is not None:
                events.append((Event.TRANSFER_STARTED, at_s - self.transfer.transfer_s))
        return sorted(events, key=lambda row: row[1])
