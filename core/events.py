"""The one vocabulary of what happens to a request and to a step; kept in memory and, on demand, as JSON lines."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import IO, Literal

logger = logging.getLogger(__name__)


class Event(Enum):
    """Life-cycle events of a request, in the order of a request that meets no trouble."""

    ARRIVED = "arrived"
    ADMITTED = "admitted"
    GRANTED = "granted"
    PREFILL_QUEUED = "prefill_queued"
    PREFILL_STARTED = "prefill_started"
    FIRST_TOKEN = "first_token"
    TRANSFER_STARTED = "transfer_started"
    TRANSFER_FINISHED = "transfer_finished"
    DECODE_QUEUED = "decode_queued"
    DECODE_STARTED = "decode_started"
    PREEMPTED = "preempted"
    RESUMED = "resumed"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({Event.FINISHED, Event.FAILED, Event.CANCELLED})


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEvent:
    """One edge of one request's life. `at_s` is this host's monotonic clock; `detail` never holds text or tokens."""

    request_id: str
    attempt: int
    event: Event
    at_s: float
    detail: dict[str, str | int | float] = field(default_factory=dict)


StepKind = Literal["prefill", "decode", "mixed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One engine step; the planner's calibration reads the same records."""

    step: int
    at_s: float  # monotonic, when the step began
    kind: StepKind
    num_sequences: int
    num_prefill_tokens: int
    num_decode_tokens: int
    num_context_tokens: int  # sum over sequences of tokens attended to
    num_new_tokens: int  # tokens sampled
    schedule_s: float
    run_s: float
    total_s: float
    num_waiting: int
    num_free_blocks: int


class Recorder:
    """Rings of recent events and steps; with a directory, every one is also appended to `<name>.jsonl` there.

    Thread-safe: the device loop and the event loop both write.
    """

    def __init__(self, process: str, trace_dir: Path | None = None, capacity: int = 2_048) -> None:
        self.process = process
        self._lock = threading.Lock()
        self.events: deque[RequestEvent] = deque(maxlen=capacity)
        self.steps: deque[StepRecord] = deque(maxlen=capacity)
        self._file: IO[str] | None = None
        if trace_dir is not None:
            trace_dir.mkdir(parents=True, exist_ok=True)
            path = trace_dir / f"{process}-{os.getpid()}.jsonl"
            self._file = path.open("a", buffering=1, encoding="utf-8")

    def event(
        self,
        request_id: str,
        event: Event,
        *,
        attempt: int = 1,
        at_s: float | None = None,
        **detail: str | int | float,
    ) -> None:
        record = RequestEvent(
            request_id=request_id,
            attempt=attempt,
            event=event,
            at_s=time.monotonic() if at_s is None else at_s,
            detail=detail,
        )
        with self._lock:
            self.events.append(record)
            self._write("event", record)

    def step(self, record: StepRecord) -> None:
        with self._lock:
            self.steps.append(record)
            self._write("step", record)

    def timeline(self, request_id: str) -> list[RequestEvent]:
        """The events of one request that are still in memory, oldest first."""
        with self._lock:
            found = [event for event in self.events if event.request_id == request_id]
        return sorted(found, key=lambda event: event.at_s)

    def recent_steps(self) -> Iterable[StepRecord]:
        with self._lock:
            return list(self.steps)

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _write(self, kind: Literal["event", "step"], record: RequestEvent | StepRecord) -> None:
        """Append to the file, if there is one. A disk that is full ends the trace, not the requests."""
        if self._file is None:
            return
        row = {"type": kind, "process": self.process, **asdict(record)}
        if isinstance(record, RequestEvent):
            row["event"] = record.event.value
        try:
            self._file.write(json.dumps(row) + "\n")
        except OSError as error:
            logger.warning("the trace of %s ends here: %s", self.process, error)
            with contextlib.suppress(OSError):  # it has the same line to write
                self._file.close()
            self._file = None
