"""One worker of a simulation: the real step scheduler, with a latency model in the place of a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Protocol

from ..core.events import Event
from ..core.request import Request
from ..scheduling.blocks import BlockAllocator
from ..scheduling.decode_runs import DecodeRun
from ..scheduling.sequence import Sequence
from ..scheduling.step_plan import StepPlan
from ..scheduling.steps import StepScheduler
from .decode_timing import RunTiming, time_run
from .event_queue import EventQueue
from .request_life import RequestLife
from .step_log import StepLog
from .trace_contents import TOKEN, TraceContents
from .types import WorkerSpec

_RATE_WEIGHT = 0.2  # of the newest step in the moving average, as workers keep it


class WorkerEvents(Protocol):
    """What a worker tells of its steps."""

    def step_started(self, worker: SimulatedWorker, plan: StepPlan, *, from_s: float, until_s: float) -> None:
        """A step that is not part of a run; its chunks' KV comes into being by and by."""
        ...

    def first_token(self, worker: SimulatedWorker, life: RequestLife, at_s: float) -> None: ...

    def finished(self, worker: SimulatedWorker, life: RequestLife, at_s: float) -> None: ...


class SimulatedWorker:
    """Steps follow each other while there is work. Decode steps that differ in nothing but their contexts pass as one
    event; whatever happens meanwhile cuts that run at the step that is under way.

    Args:
        block_size: tokens of a simulated KV block, a multiple of the worker's own.
        lives: every live request by id.
    """

    def __init__(
        self,
        name: str,
        spec: WorkerSpec,
        queue: EventQueue,
        events: WorkerEvents,
        contents: TraceContents,
        lives: Mapping[str, RequestLife],
        *,
        block_size: int,
        max_waiting: int,
        headroom_tokens: int,
        prefix_cache: bool,
    ) -> None:
        self.name = name
        self.spec = spec
        self.log = StepLog()
        num_blocks = max(1, spec.num_blocks * spec.block_size // block_size)
        self.scheduler = StepScheduler(
            BlockAllocator(num_blocks, block_size, prefix_cache=prefix_cache),
            model_id="",
            kv_dtype="",
            max_running=spec.max_running,
            max_waiting=max_waiting,
            max_step_tokens=spec.max_step_tokens,
            max_packed_tokens=spec.max_packed_tokens,
            contents=contents,
        )
        self.max_tokens = num_blocks * block_size  # of one request
        # As after a warm-up; from then on measured.
        self.prefill_tokens_per_s = _rate(
            spec.max_step_tokens, spec.latency.prefill_step_s([(spec.max_step_tokens, 0)])
        )
        self.decode_step = (0, 0.0)  # sequences and seconds of the last step that did nothing else
        self._queue = queue
        self._events = events
        self._lives = lives
        self._headroom_tokens = headroom_tokens
        self._plan: StepPlan | None = None  # the step under way, or
        self._run: DecodeRun | None = None  # the run under way
        self._timing: RunTiming | None = None  # of the run
        self._began_s = 0.0  # of the step or run
        self._settling = False  # what ended is being told; the next step waits for what that brings
        self._version = 0  # of the step or run; the end of an older one means nothing
        self._arrived: list[RequestLife] = []  # by transfer, in the last step of the run under way
        self._joining: list[RequestLife] = []  # get a token from the next step on
        self._joined: list[RequestLife] = []  # do so in the step or run under way

    @property
    def num_sequences(self) -> int:
        return self.scheduler.num_running + self.scheduler.num_waiting

    # --- what the router asks for ---

    def add(self, request: Request, *, prefill_only: bool = False) -> None:
        """Raises: Overloaded."""
        if not self.scheduler.num_waiting:  # otherwise nobody gets past the one who waits already
            self._shorten_run()
        self.scheduler.add(request, prefill_only=prefill_only)
        self._wake()

    def reserve(self, request: Request) -> Sequence:
        """Raises: Overloaded."""
        if self._run is not None:
            spare = self.scheduler.blocks.num_available - self._run.num_new_blocks
            if spare * self.scheduler.blocks.block_size < request.num_tokens + self._headroom_tokens:
                self._cut_run()
        return self.scheduler.reserve(request, self._headroom_tokens)

    def start_reserved(self, life: RequestLife) -> None:
        if self._run is not None:
            self._shorten_run()
            self._arrived.append(life)
            return
        self._start_reserved(life)
        self._wake()

    def release(self, request_id: str) -> None:
        self._cut_run()
        self.scheduler.release(request_id)
        self._wake()

    # --- steps ---

    def _start_reserved(self, life: RequestLife) -> None:
        self.scheduler.start_reserved(life.request_id, TOKEN)
        self._joining.append(life)

    def _wake(self) -> None:
        if self._plan is None and self._run is None and not self._settling:
            self._begin()

    def _start_arrived(self) -> None:
        arrived, self._arrived = self._arrived, []
        for life in arrived:
            self._start_reserved(life)

    def _begin(self) -> None:
        """Start what comes next, if anything does."""
        self._began_s = self._queue.now_s
        run = self.scheduler.steps_until_change()
        if run is None:
            plan = self.scheduler.schedule()
            if plan is not None:
                self._begin_plan(plan)
            for sequence in self.scheduler.take_preempted():
                self._preempted(self._lives[sequence.request_id])
            return
        timing = time_run(
            self.spec.latency, num_steps=run.num_steps, batch=run.batch, context_tokens=run.num_context_tokens
        )
        self._run, self._timing = run, timing
        self._take_joining()
        for sequence in run.started:
            self._lives[sequence.request_id].mark(Event.DECODE_STARTED, self._began_s)
        self._end_at(self._began_s + timing.total_s)

    def _begin_plan(self, plan: StepPlan) -> None:
        for sequence in plan.preempted:
            self._preempted(self._lives[sequence.request_id])
        self._plan = plan
        self._take_joining()
        for sequence in plan.started:
            event = Event.DECODE_STARTED if sequence.arrived_by_transfer else Event.PREFILL_STARTED
            self._lives[sequence.request_id].mark(event, self._began_s)
        for sequence in plan.resumed:
            self._lives[sequence.request_id].mark(Event.RESUMED, self._began_s)
        until_s = self._began_s + self._step_s(plan)
        self._end_at(until_s)
        self._events.step_started(self, plan, from_s=self._began_s, until_s=until_s)

    def _step_s(self, plan: StepPlan) -> float:
        batch = plan.num_decode_tokens
        decodes, prefills = plan.parts[:batch], plan.parts[batch:]
        context_tokens = sum(part.end for part in decodes)
        if not prefills:
            return self.spec.latency.decode_step_s(batch, context_tokens)
        chunks = [(part.num_tokens, part.start) for part in prefills]
        if not batch:
            return self.spec.latency.prefill_step_s(chunks)
        return self.spec.latency.mixed_step_s(chunks, batch, context_tokens)

    def _take_joining(self) -> None:
        self._joined, self._joining = self._joining, []

    def _preempted(self, life: RequestLife) -> None:
        life.mark(Event.PREEMPTED, self._began_s)
        life.num_preemptions += 1
        life.close_span(self.log, self._began_s)
        if life in self._joining:
            self._joining.remove(life)

    def _end_at(self, time_s: float) -> None:
        self._version += 1
        self._queue.at(time_s, partial(self._ended, self._version))

    def _ended(self, version: int) -> None:
        if version != self._version:
            return  # that run was cut
        self._settling = True
        if self._run is not None and self._timing is not None:
            self._run_ended(self._timing.num_steps)
        elif self._plan is not None:
            self._plan_ended(self._plan)
        self._start_arrived()
        self._settling = False
        self._begin()

    def _shorten_run(self) -> None:
        """Let the run under way end with the step that is being computed now: somebody joins then."""
        if self._timing is None:
            return
        num_steps = self._timing.steps_within(self._queue.now_s - self._began_s) + 1
        if num_steps < self._timing.num_steps:
            self._timing = replace(self._timing, num_steps=num_steps)
            self._end_at(self._began_s + self._timing.total_s)

    def _cut_run(self) -> None:
        """Turn the run under way into its steps so far and the single step that is being computed now."""
        if self._run is None or self._timing is None:
            return
        timing = self._timing
        num_steps = timing.steps_within(self._queue.now_s - self._began_s)
        if num_steps:
            self._run_ended(num_steps)
        else:
            self._joining = self._joined
        self._run = None
        self._began_s += timing.elapsed_s(num_steps)
        plan = self.scheduler.schedule()
        assert plan is not None, "a run goes on as it was foreseen"
        self._begin_plan(plan)
        self._start_arrived()

    def _run_ended(self, num_steps: int) -> None:
        """The first `num_steps` steps of the run are over."""
        run, timing = self._run, self._timing
        assert run is not None
        assert timing is not None
        self._log_entry(num_steps, timing.first_step_s, timing.step_s(num_steps - 1), run.batch)
        self.decode_step = (run.batch, timing.step_s(num_steps - 1))
        self._run = self._timing = None
        for sequence in self.scheduler.advance(num_steps, TOKEN):
            self._finished(sequence)

    def _plan_ended(self, plan: StepPlan) -> None:
        now_s = self._queue.now_s
        step_s = now_s - self._began_s
        # A prompt whose last chunk is one token is planned among the decodes, but it has no token before that one.
        batch = sum(1 for part in plan.parts[: plan.num_decode_tokens] if part.index > 0)
        self._log_entry(1, step_s, step_s, batch)
        if plan.num_prefill_tokens and not plan.num_decode_tokens:
            rate = _rate(plan.num_prefill_tokens, step_s)
            self.prefill_tokens_per_s += _RATE_WEIGHT * (rate - self.prefill_tokens_per_s)
        elif not plan.num_prefill_tokens:
            self.decode_step = (batch, step_s)
        self._plan = None
        for part in plan.parts[plan.num_decode_tokens :]:
            life = self._lives[part.sequence.request_id]
            if part.sequence.is_decoding and not part.samples and life.first_token_s is not None:
                self._joining.append(life)  # all but the newest token is computed again after a preemption
        for token in self.scheduler.commit({part.sequence.request_id: TOKEN for part in plan.parts if part.samples}):
            life = self._lives[token.sequence.request_id]
            if life.first_token_s is None:
                life.first_token_s = life.last_token_s = now_s
                life.num_cached = token.sequence.num_cached
                self._events.first_token(self, life, now_s)
            elif life.span_from is None:  # computed again after a preemption
                life.gaps_s.append(now_s - life.last_token_s)
                life.last_token_s = now_s
            if token.sequence.prefill_only:
                continue
            if token.finish_reason is not None:
                self._finished(token.sequence)
            elif life.span_from is None:
                self._joining.append(life)

    def _log_entry(self, num_steps: int, first_step_s: float, last_step_s: float, batch: int) -> None:
        for life in self._joined:
            life.open_span(len(self.log), self._began_s + first_step_s - life.last_token_s)
        self.log.append(
            num_steps=num_steps,
            first_step_s=first_step_s,
            last_step_s=last_step_s,
            batch=batch,
            num_joined=len(self._joined),
        )
        self._joined = []

    def _finished(self, sequence: Sequence) -> None:
        life = self._lives[sequence.request_id]
        life.close_span(self.log, self._queue.now_s)
        self._events.finished(self, life, self._queue.now_s)


def _rate(num_tokens: int, step_s: float) -> float:
    return num_tokens / step_s if step_s > 0 else float("inf")
