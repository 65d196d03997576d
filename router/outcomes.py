"""What became of a router's requests: the event, the counts and the metrics of each end."""

from __future__ import annotations

from ..core.errors import Cancelled
from ..core.events import Event
from ..core.metrics import RouterMetrics
from .job import Job
from .traffic import Traffic


class Outcomes:
    """Of all requests since the start; the autoscaler reads `traffic`."""

    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics = metrics
        self.traffic = Traffic()
        self.num_finished = 0
        self.num_failed = 0
        self.num_cancelled = 0  # by their clients

    def ended(self, job: Job, now: float, *, num_live: int) -> None:
        """The one end of a request; `num_live` others go on."""
        reason, error, timeline, metrics = job.answer.finish_reason, job.error, job.timeline, self._metrics
        outcome = error.code if error is not None else reason.value if reason is not None else "internal"
        if error is None:
            event = Event.FINISHED
            self.num_finished += 1
        elif isinstance(error, Cancelled):
            event = Event.CANCELLED
            self.num_cancelled += 1
        else:
            event = Event.FAILED
            self.num_failed += 1
        timeline.mark(event, now, job.request.attempt, outcome=outcome)
        metrics.requests.labels(outcome).inc()
        metrics.live.set(num_live)
        self.traffic.ended(timeline, len(job.answer.token_ids), now=now)
        metrics.duplicate_tokens.inc(job.answer.num_duplicates)
        if timeline.first_token_at is not None:
            metrics.ttft_seconds.observe(timeline.first_token_at - timeline.arrived_at)
            num_gaps = len(job.answer.token_ids) - 1
            if error is None and num_gaps > 0:
                metrics.tpot_seconds.observe((now - timeline.first_token_at) / num_gaps)
