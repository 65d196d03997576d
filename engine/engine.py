"""The engine: one model, one KV pool, one step at a time: schedule, run, postprocess."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..core.errors import EngineFailed, PromptTooLong, SplitserveError
from ..core.events import Recorder
from ..core.kv_geometry import blocks_for
from ..core.request import Request
from ..scheduling.blocks import BlockAllocator
from ..scheduling.prefix_feed import PrefixChanges, PrefixFeed
from ..scheduling.step_plan import StepPlan
from ..scheduling.steps import StepScheduler
from .attention import KvWritten
from .loading import LoadedModel
from .options import EngineOptions
from .outputs import Holding, Reservation, StepOutput, Usage, step_record, token_output
from .pace import GPU_PACKED_TOKENS, StepPace
from .parallel.leader import LeadingRunner, OtherRanks
from .runner import StepResult, needs_history
from .start import model_limit, on_device

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    plan: StepPlan
    scheduled_s: float  # seconds that planning took
    quick_to_launch: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Launched:
    plan: StepPlan
    scheduled_s: float  # seconds that planning took
    at_s: float


class Engine:
    """Runs requests by steps. Thread-safe: its lock is held to schedule and postprocess, not during the forward pass.

    Args:
        recorder: gets a record of each step.
        kv_written: called on the device thread, inside the forward pass, when KV of a `prefill_only` sequence is in
            the pool: per layer and chunk, and once with all layers for tokens that the prefix cache held.
        others: the ranks that hold the model together with this process, if it is split.
    """

    def __init__(
        self,
        model: LoadedModel,
        options: EngineOptions,
        *,
        recorder: Recorder | None = None,
        kv_written: KvWritten | None = None,
        others: OtherRanks | None = None,
    ) -> None:
        if options.num_threads is not None:
            torch.set_num_threads(options.num_threads)
        self.options = options
        self.geometry = model.geometry
        self.vocab_size = model.vocab_size
        self._model_limit = model_limit(model, options)
        self.pool, runner = on_device(model, options, kv_written)
        self._runner = runner if others is None else LeadingRunner(runner, others)
        num_blocks = self.pool.num_blocks
        self.max_model_len = min(self._model_limit, num_blocks * options.block_size)
        self._recorder = recorder
        self._kv_written = kv_written
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._due: set[str] = set()  # reservations whose transfers are about to end
        on_cpu = model.model.device.type == "cpu"
        self._scheduler = StepScheduler(
            BlockAllocator(num_blocks, options.block_size, prefix_cache=options.prefix_cache),
            model_id=model.model_id,
            kv_dtype=model.geometry.dtype,
            max_running=options.max_running,
            max_waiting=options.max_waiting,
            max_step_tokens=options.max_step_tokens,
            max_packed_tokens=options.max_packed_tokens or (None if on_cpu else GPU_PACKED_TOKENS),
        )
        self.num_steps = 0
        self._num_unaccounted = 0
        self._launched: deque[_Launched] = deque()  # steps that run, the oldest first
        self._postponed: _Planned | None = None  # the next step() begins with it
        self._step_began_s = 0.0
        self._pace = StepPace()
        self.prompt_tokens = 0  # prompt tokens computed
        self.output_tokens = 0  # tokens sampled
        self.recomputed_prompt_tokens = 0  # of them, those whose KV should have come by transfer

    # --- requests, from any thread ---

    def add(self, request: Request, *, prefill_only: bool = False) -> None:
        """Queue a request; a `prefill_only` one is held after its first token until `release`.

        Raises: InvalidRequest, PromptTooLong: this engine can never serve it. Overloaded: the queue is full.
        """
        # A prefill-only sequence never grows past its prompt, so only the model bounds the whole request.
        limit = self._model_limit if prefill_only else self.max_model_len
        request.validate(max_model_len=limit, vocab_size=self.vocab_size)
        self._check_fits(request)
        with self._lock:
            self._scheduler.add(request, prefill_only=prefill_only, arrived_at=_arrived_at(request))

    def reserve(self, request: Request, kv_history: str = "none") -> Reservation:
        """Take blocks for a request whose KV comes by transfer; what the prefix cache holds of it is pinned.

        Args: kv_history: what the KV loses on the way here; it never serves requests of another history.
        Raises: InvalidRequest, PromptTooLong: never possible here. Overloaded: not now; nothing was taken.
        """
        request.validate(max_model_len=self.max_model_len, vocab_size=self.vocab_size)
        with self._lock:
            sequence = self._scheduler.reserve(
                request, self.options.decode_headroom_tokens, kv_history, _arrived_at(request)
            )
            return Reservation(
                request_id=request.request_id,
                block_ids=tuple(sequence.block_table),
                num_cached_tokens=sequence.num_cached,
            )

    def start_reserved(self, request_id: str, first_token_id: int) -> None:
        """The KV of all the request's tokens is in its blocks: decode on from its next output token.

        Raises: InvalidRequest: there is no such reservation, or that token ends the request.
        """
        with self._lock:
            self._scheduler.start_reserved(request_id, first_token_id)
            self._no_longer_due(request_id)

    def expect_reserved(self, request_id: str) -> None:
        """`start_reserved` or `release` will follow within a millisecond: the next step may wait for it."""
        with self._lock:
            if self._scheduler.is_reserved(request_id):  # else it was released meanwhile, and nobody would take it out
                self._due.add(request_id)

    def _no_longer_due(self, request_id: str) -> None:
        self._due.discard(request_id)
        self._arrived.notify_all()

    def release(self, request_id: str) -> bool:
        """Forget a request in whatever state and free its blocks, after the running step if that uses them.

        Returns False if there is no such request (any more).
        """
        with self._lock:
            self._no_longer_due(request_id)
            released = self._scheduler.release(request_id)
            self._check_blocks()
            return released

    def block_table(self, request_id: str) -> tuple[int, ...]:
        """Raises: KeyError: no such live request."""
        with self._lock:
            return tuple(self._scheduler.get(request_id).block_table)

    def has_work(self) -> bool:
        with self._lock:
            return self._scheduler.has_work

    def usage(self) -> Usage:
        with self._lock:
            return Usage.of(self._scheduler)

    # The prefix cache, as routers are told of it.

    def follow_prefixes(self) -> PrefixFeed | None:
        """A feed of the blocks that the prefix cache holds, until `unfollow_prefixes`; None: it is off."""
        with self._lock:
            return self._scheduler.blocks.follow() if self.options.prefix_cache else None

    def unfollow_prefixes(self, feed: PrefixFeed) -> None:
        with self._lock:
            self._scheduler.blocks.unfollow(feed)

    def restart_prefixes(self, feed: PrefixFeed) -> None:
        """Have the feed tell everything again."""
        with self._lock:
            self._scheduler.blocks.restart(feed)

    def take_prefixes(self, feed: PrefixFeed) -> PrefixChanges | None:
        """What is to be told next; None: nothing changed."""
        if not feed.has_news:  # without the lock: what comes this moment is told next time
            return None
        with self._lock:
            return feed.take()

    def num_orphaned_blocks(self) -> int:
        """Blocks that somebody owns according to the allocator and that are in no block table; more than 0 is a bug.

        Looks at every block: for scrapes and tests, not for each status.
        """
        with self._lock:
            return max(self._scheduler.num_orphaned_blocks(), self._scheduler.num_unaccounted_blocks())

    def holdings(self) -> list[Holding]:
        """What every sequence holds, by request id."""
        with self._lock:
            return [Holding.of(sequence) for sequence in self._scheduler.holdings()]

    def _check_blocks(self) -> None:
        """Conservation, after each step and each release: free + cached + granted + live = total."""
        unaccounted = self._scheduler.num_unaccounted_blocks()
        if unaccounted > self._num_unaccounted:
            counts = self._scheduler.blocks.counts()
            logger.error(
                "%d KV blocks are unaccounted for: %s; restart this worker and report this", unaccounted, counts
            )
        self._num_unaccounted = unaccounted

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache served instead of the model."""
        return self._scheduler.cached_tokens

    @property
    def captured(self) -> bool:
        """Whether steps run as CUDA graphs."""
        return self._runner.captured

    @property
    def preemptions(self) -> int:
        return self._scheduler.num_preemptions

    # --- steps, from the device thread only ---

    def warm_up(self) -> None:
        """Prepare what this thread needs, so that no step has to."""
        self._runner.warm_up()

    def step(self) -> StepOutput | None:
        """Finish the oldest running step; before that, start the one that follows it, so that the device never idles.

        Where it cannot be started yet (`_may_follow`), the running one's tokens leave first, and the next call starts
        it. None when nothing can go on right now.
        """
        self._step_began_s = time.monotonic()
        if self._postponed is not None:
            postponed, self._postponed = self._postponed, None
            self._launch(postponed)
        while len(self._launched) < self._runner.max_steps:
            if self._launched:
                self._wait_to_plan(self._launched[-1])
            began_s = time.monotonic()
            with self._lock:
                plan = self._scheduler.schedule()
            if plan is None:
                break
            planned = _Planned(
                plan=plan, scheduled_s=time.monotonic() - began_s, quick_to_launch=self._runner.is_quick(plan)
            )
            if self._launched and not self._may_follow(planned):
                self._postponed = planned
                break
            self._launch(planned)
        return self._finish_step() if self._launched else None

    def _may_follow(self, planned: _Planned) -> bool:
        """Whether a step may be launched while the one before it runs."""
        if any(needs_history(part) for part in planned.plan.parts):
            return False  # its sampling looks at tokens that the running step still chooses
        # The running step's tokens would wait until it is launched.
        running = self._launched[-1]
        return planned.quick_to_launch or self._pace.outlasts(
            running.plan.num_prefill_tokens, running.at_s, launches_prompt=planned.plan.num_prefill_tokens > 0
        )

    def close(self) -> None:
        """No step follows. What ranks captured must be gone before they part."""
        self._runner.close()

    def bare_step(self, batch: int) -> Callable[[], None]:
        """The device's part of a decode step of `batch` sequences, for benchmarks; on a GPU one replay of its graph."""
        return self._runner.bare_step(batch)

    def _wait_to_plan(self, running: _Launched) -> None:
        """Plan the step behind a decode step just in time: a sequence that arrives meanwhile takes part in it."""
        wait_s = self._pace.wait_s(running.plan.num_prefill_tokens, running.at_s)
        if wait_s is None:
            return
        if wait_s > 0:
            time.sleep(wait_s)
        if self._due:  # for a fraction of a step, which everybody else's token waits too
            with self._lock:
                if not self._arrived.wait_for(lambda: not self._due, timeout=self._pace.hold_s):
                    self._due.clear()  # once: a transfer that broke at its end takes seconds to go on

    def _launch(self, planned: _Planned) -> None:
        plan = planned.plan
        if self._kv_written is not None:
            for sequence in plan.started:
                if sequence.prefill_only and sequence.num_cached:
                    self._kv_written(sequence.request_id, 0, self.geometry.num_layers, 0, sequence.num_cached)
        began_s = time.monotonic()
        self._runner.launch(plan)
        self._launched.append(_Launched(plan=plan, scheduled_s=planned.scheduled_s, at_s=began_s))
        took_s = planned.scheduled_s + time.monotonic() - began_s
        self._pace.launched(took_s, slow=plan.num_prefill_tokens > 0 and not planned.quick_to_launch)

    def _finish_step(self) -> StepOutput:
        result = self._runner.collect()
        launched = self._launched.popleft()
        ended_s = time.monotonic()
        with self._lock:
            output = self._postprocess(launched, result, ended_s)
        self._pace.ended(launched.plan.num_prefill_tokens, launched.at_s, ended_s)
        return output

    def abandon_step(self, error: Exception) -> StepOutput | None:
        """After `step` raised: drop the sequences of that step and free their blocks; `failed` says whose.

        None if no step was planned, so that another attempt would end in the same way.
        """
        if not isinstance(error, SplitserveError):
            error = EngineFailed(f"the engine step failed with {type(error).__name__}: {error}; send the request again")
        with self._lock:
            self._launched.clear()
            self._postponed = None
            self._runner.abandon()
            if not self._scheduler.has_plans:
                return None
            dropped = self._scheduler.abandon()
            self.num_steps += 1
            record = step_record(
                self._scheduler,
                "mixed",
                step=self.num_steps,
                num_sequences=len(dropped),
                began_s=self._step_began_s,
                ended_s=time.monotonic(),
            )
        failed: list[tuple[str, SplitserveError]] = [(sequence.request_id, error) for sequence in dropped]
        return StepOutput(record=record, tokens=[], started=[], preempted=[], resumed=[], failed=failed)

    def _postprocess(self, launched: _Launched, result: StepResult, ended_s: float) -> StepOutput:
        plan = launched.plan
        for part in plan.parts:
            prompt = max(0, min(part.end, part.sequence.request.num_prompt_tokens) - part.start)
            self.prompt_tokens += prompt
            if part.sequence.arrived_by_transfer:
                self.recomputed_prompt_tokens += prompt
            if (told := result.prompt_logprobs.get(part.sequence.request_id)) is not None:
                first, logprobs = told
                known = part.sequence.prompt_logprobs  # of prompt tokens from the second on
                known += logprobs[len(known) + 1 - first :]
        failed = [
            (part.sequence.request_id, result.failed[part.sequence.request_id])
            for part in plan.parts
            if part.sequence.request_id in result.failed and not part.sequence.released
        ]
        tokens = self._scheduler.commit(result.token_ids)
        self._check_blocks()
        self.output_tokens += len(tokens)
        self.num_steps += 1
        record = step_record(
            self._scheduler,
            "prefill" if not plan.num_decode_tokens else "mixed" if plan.num_prefill_tokens else "decode",
            step=self.num_steps,
            num_sequences=len(plan.parts),
            began_s=self._pace.began_s(launched.at_s),
            ended_s=ended_s,
            schedule_s=launched.scheduled_s,
            plan=plan,
            num_new_tokens=len(tokens),
        )
        if self._recorder is not None:
            self._recorder.step(record)
        return StepOutput(
            record=record,
            tokens=[token_output(token, result) for token in tokens],
            started=[sequence.request_id for sequence in plan.started],
            preempted=[sequence.request_id for sequence in plan.preempted],
            resumed=[sequence.request_id for sequence in plan.resumed],
            failed=failed,
        )

    def _check_fits(self, request: Request) -> None:
        needed = blocks_for(request.num_tokens, self.options.block_size)
        if needed > self.pool.num_blocks:
            raise PromptTooLong(
                f"the request's {request.num_tokens:,} tokens need {needed:,} KV blocks, the pool has "
                f"{self.pool.num_blocks:,}; shorten it or raise kv_memory_bytes",
                field="prompt",
            )


def _arrived_at(request: Request) -> float:
    """When the request came to a router, by this process's clock."""
    return time.monotonic() - request.waited_s
