"""Step scheduler: which tokens of which sequences the next engine step computes, and what becomes of them afterwards.

Decodes go first, one token each; what is left of the step's budget goes to prefill chunks in queue order. Out of
blocks, the sequence that would be served last gives its blocks up and is recomputed later.

A step may be planned while the one before it still runs, so that a device never waits for the host. Which token that
one chooses is not known then, only that there will be one: `PENDING` takes its place.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Mapping

from ..core.errors import InvalidRequest, Overloaded
from ..core.kv_geometry import blocks_for
from ..core.request import Request
from .block_tables import BlockTables
from .blocks import BlockAllocator
from .decode_runs import DecodeRun, foresee_run
from .prefix import Contents, TokenContents
from .sequence import PENDING, Sequence, SequenceState
from .step_plan import SampledToken, ScheduledTokens, StepPlan, next_part

_RETRY_AFTER_S = 0.5
_MAX_PLANS = 2  # one running, one ready to follow it
MAX_PROMPT_LOGITS = 256  # rows of logits of prompt tokens in one step: each is as long as the vocabulary


class StepScheduler:
    """Queues, block tables and the step plan of one engine. Not thread-safe: the engine's lock guards it.

    Args:
        max_packed_tokens: no further prompt joins a step that has this many prefill tokens. Past the size from which
            a device is busy, it would be no sooner done, and would delay those before it. None: up to max_step_tokens.
        contents: what stands for tokens and their prefixes. None: real tokens, of this model and dtype.
    """

    def __init__(
        self,
        blocks: BlockAllocator,
        *,
        model_id: str,
        kv_dtype: str,
        max_running: int,
        max_waiting: int,
        max_step_tokens: int,
        max_packed_tokens: int | None = None,
        contents: Contents | None = None,
    ) -> None:
        self.blocks = blocks
        self._contents = contents or TokenContents(model_id=model_id, kv_dtype=kv_dtype)
        self._tables = BlockTables(blocks, self._contents)
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._max_step_tokens = max_step_tokens
        self._max_packed_tokens = min(max_step_tokens, max_packed_tokens or max_step_tokens)
        self._sequences: dict[str, Sequence] = {}  # every one that is not finished
        self._waiting: list[Sequence] = []  # the preempted first, else in queue order
        self._running: list[Sequence] = []  # in queue order
        self._plans: deque[StepPlan] = deque()  # being run, the oldest first
        self._preempted: list[Sequence] = []  # and in no plan yet
        self._starved = False  # somebody waits for blocks, so reservations must not take them
        self._arrivals = 0
        self.num_preemptions = 0
        self.cached_tokens = 0  # prompt tokens that the prefix cache served

    # --- queues ---

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def has_plans(self) -> bool:
        """Whether a step is planned and not committed."""
        return bool(self._plans)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def num_in(self, state: SequenceState) -> int:
        return sum(1 for sequence in self._sequences.values() if sequence.state is state)

    @property
    def outstanding_prefill_tokens(self) -> int:
        """Tokens that waiting and running sequences still need computed before they decode."""
        return sum(s.num_uncomputed for s in (*self._waiting, *self._running) if not s.is_decoding)

    def get(self, request_id: str) -> Sequence:
        """Raises: KeyError: no such live sequence."""
        return self._sequences[request_id]

    def add(self, request: Request, *, prefill_only: bool = False, arrived_at: float = 0.0) -> None:
        """Queue a request.

        Args: arrived_at: of equal priority the earliest goes first; in the order of these calls where nobody says.
        Raises: Overloaded: the queue is at its bound. InvalidRequest: its id is in use.
        """
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(
                f"{len(self._waiting):,} requests are waiting, the bound is {self._max_waiting:,}; try again later",
                retry_after_s=_RETRY_AFTER_S,
            )
        sequence = Sequence(
            request=request,
            arrival=self._arrivals + 1,
            arrived_at=arrived_at,
            prefill_only=prefill_only,
            token_ids=self._contents.token_ids(request),
        )
        self._enter(sequence)
        insort(self._waiting, sequence, key=_waiting_key)

    def reserve(
        self, request: Request, headroom_tokens: int, kv_history: str = "none", arrived_at: float = 0.0
    ) -> Sequence:
        """Take blocks for the KV that a transfer will bring, and for the first output tokens.

        Args:
            kv_history: the codec, or the narrower dtype, that the KV goes through; "none" if it comes as it is.
            arrived_at: as of `add`.
        Raises: Overloaded: the batch or the pool is full, or a preempted sequence is waiting; nothing was taken.
        """
        busy = len(self._running) + len(self._waiting) + self.num_in(SequenceState.RESERVED)
        if busy >= self._max_running:
            raise Overloaded(
                f"{busy} sequences are running or about to, max_running is {self._max_running}; try again later",
                retry_after_s=_RETRY_AFTER_S,
            )
        sequence = Sequence(
            request=request,
            arrival=self._arrivals + 1,
            arrived_at=arrived_at,
            arrived_by_transfer=True,
            kv_history=kv_history,
            state=SequenceState.RESERVED,
            token_ids=self._contents.token_ids(request),
        )
        hits = self._tables.cached(sequence, sequence.num_tokens - 1)
        num_tokens = sequence.num_tokens + min(headroom_tokens, request.max_tokens - len(request.output_token_ids))
        needed = blocks_for(num_tokens, self.blocks.block_size) - len(hits)
        starved = self._starved and bool(self._waiting)
        if starved or not self.blocks.can_allocate(needed, hits):
            raise Overloaded(
                f"the request needs {needed:,} KV blocks, {self.blocks.num_available:,} can be had"
                + (" and sequences that arrived before are waiting for them" if starved else "")
                + "; try again later or another worker",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._enter(sequence)
        self._tables.fill(sequence, hits, num_tokens)
        return sequence

    def start_reserved(self, request_id: str, first_token_id: int) -> None:
        """The transfer is committed: decode from `first_token_id` on.

        Raises: InvalidRequest: no such reservation, or its first token is also its last.
        """
        if not self.is_reserved(request_id):
            raise InvalidRequest(f"request {request_id} has no reservation here; reserve before start_reserved")
        sequence = self._sequences[request_id]
        sequence.token_ids.append(first_token_id)
        if sequence.finish_reason(sequence.num_tokens - 1) is not None:
            sequence.token_ids.pop()
            raise InvalidRequest(f"request {request_id} ends with its first token; release it instead of starting it")
        sequence.num_computed = sequence.num_tokens - 1
        self.blocks.grant_to_live(sequence.block_table)
        sequence.state = SequenceState.RUNNING
        self._tables.publish(sequence, sequence.num_computed)
        insort(self._running, sequence, key=_queue_key)

    def is_reserved(self, request_id: str) -> bool:
        sequence = self._sequences.get(request_id)
        return sequence is not None and sequence.state is SequenceState.RESERVED

    def release(self, request_id: str) -> bool:
        """Forget a sequence in whatever state; blocks that a running step uses are freed when it ends."""
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.released:
            return False
        self._finish(sequence)
        return True

    # --- steps ---

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None when no sequence can go on, or none before the running step is committed."""
        assert len(self._plans) < _MAX_PLANS, "commit the running steps first"
        num_before = len(self._preempted)  # by an earlier call that came to no plan
        # Evaluated one by one: growing one sequence may preempt those behind it, which then no longer decode.
        parts: list[ScheduledTokens] = []
        for sequence in tuple(self._running):
            if sequence.is_decoding and sequence.can_run and sequence.state is SequenceState.RUNNING:
                if self._plans and self._must_preempt(sequence):
                    return None  # the running step needs the victim's blocks, and its token is not known yet
                if self._grow(sequence):
                    parts.append(next_part(sequence, 1))
        num_decode = len(parts)

        budget = self._max_step_tokens
        logits_left = MAX_PROMPT_LOGITS
        for sequence in self._running:
            most = min(budget, logits_left) if sequence.needs_prompt_logits else budget
            if most and sequence.can_run and not sequence.is_decoding:
                parts.append(next_part(sequence, most))
                budget -= parts[-1].num_tokens
                logits_left -= len(parts[-1].prompt_targets)
        started: list[Sequence] = []
        resumed: list[Sequence] = []
        full = self._max_step_tokens - self._max_packed_tokens
        while budget > full and len(self._preempted) == num_before and (admitted := self._admit(logits_left)):
            parts.append(next_part(admitted, min(budget, logits_left) if admitted.needs_prompt_logits else budget))
            budget -= parts[-1].num_tokens
            logits_left -= len(parts[-1].prompt_targets)
            if not admitted.started:
                started.append(admitted)
            elif admitted.preempted:
                resumed.append(admitted)
            admitted.started, admitted.preempted = True, False
        if not parts:
            # What the last one gave up may be room for whoever waits, itself included, and nobody would wake them.
            return self.schedule() if len(self._preempted) > num_before else None
        for part in parts[:num_decode]:  # arrived by transfer: their first step here is a decode
            if not part.sequence.started:
                part.sequence.started = True
                started.append(part.sequence)
        plan = StepPlan(
            parts=tuple(parts),
            num_decode_tokens=num_decode,
            num_prefill_tokens=sum(part.num_tokens for part in parts[num_decode:]),
            num_context_tokens=sum(part.end for part in parts),
            started=tuple(started),
            resumed=tuple(resumed),
            preempted=self.take_preempted(),
        )
        self._plans.append(plan)
        for part in parts:
            _advance(part)
        return plan

    def take_preempted(self) -> tuple[Sequence, ...]:
        """Those that no plan has told of: whoever preempts itself may leave nothing to plan."""
        preempted, self._preempted = tuple(self._preempted), []
        return preempted

    def commit(self, sampled: Mapping[str, int]) -> list[SampledToken]:
        """The oldest planned step ran: its sequences have the sampled token of each request id that has one.

        A sequence that should have one and has none could not go on; it is forgotten.
        """
        assert self._plans, "commit without schedule"
        tokens: list[SampledToken] = []
        for part in self._plans.popleft().parts:
            sequence = part.sequence
            sequence.num_in_flight -= 1
            if sequence.released:
                self._finish(sequence)
                continue
            self._tables.publish(sequence, part.end)
            if not part.samples:
                continue
            token_id = sampled.get(sequence.request_id)
            if token_id is None:
                self.blocks.withdraw(sequence.block_table)  # the next one with its prefix would fail likewise
                self._finish(sequence)
                continue
            sequence.token_ids[part.end] = token_id
            reason = sequence.finish_reason(part.end)
            tokens.append(SampledToken(sequence=sequence, index=part.index, token_id=token_id, finish_reason=reason))
            if sequence.prefill_only:
                self._running.remove(sequence)
                sequence.state = SequenceState.HELD
            elif reason is not None:
                self._finish(sequence)
        return tokens

    def steps_until_change(self) -> DecodeRun | None:
        """The run of decode steps that comes next if nobody else arrives or leaves; None: the next step is not one.

        For simulators, which know when each answer ends: with it they pay for changes, not for tokens. `advance` takes
        the run or its first steps. Sequences take the blocks of a run one after the other instead of in turn, so
        that the cache may evict other blocks than it would step by step.
        """
        if self._plans or not self._running or self._admissible() is not None:
            return None
        return foresee_run(self._running, self.blocks)

    def advance(self, num_steps: int, token_id: int) -> list[Sequence]:
        """Account for the first steps of a run in which every token is `token_id`; returns the sequences that ended."""
        ended: list[Sequence] = []
        token_ids = [token_id] * num_steps
        size, publishes = self.blocks.block_size, self.blocks.has_prefix_cache
        for sequence in tuple(self._running):  # what a simulator spends most of its time with
            num_computed = sequence.num_computed + num_steps
            needed = -(-num_computed // size) - len(sequence.block_table)
            if needed > 0:
                sequence.block_table += self.blocks.allocate(needed)
            sequence.token_ids.extend(token_ids)
            sequence.num_computed = num_computed
            sequence.started = True
            if publishes:
                self._tables.publish(sequence, num_computed)
            if num_computed + 1 >= sequence.max_num_tokens:
                self._finish(sequence)
                ended.append(sequence)
        return ended

    def abandon(self) -> list[Sequence]:
        """The planned steps failed: forget their sequences and return those that nobody had released."""
        dropped = {part.sequence.request_id: part.sequence for plan in self._plans for part in plan.parts}
        self._plans.clear()
        lost = [sequence for sequence in dropped.values() if not sequence.released]
        for sequence in dropped.values():
            sequence.num_in_flight = 0
            self._finish(sequence)
        return lost

    def num_orphaned_blocks(self) -> int:
        """Blocks that are owned according to the allocator but in no block table; anything but 0 is a bug."""
        tables: set[int] = set()
        for sequence in self._sequences.values():
            tables.update(sequence.block_table)
        return len(self.blocks.owned() - tables)

    def num_unaccounted_blocks(self) -> int:
        """How far the counts are from adding up, in constant time; anything but 0 is a bug.

        While sequences live, blocks that are owned twice or by nobody may hide here; once none does, this is exact.
        """
        counts = self.blocks.counts()
        owned = counts.live + counts.granted if self._sequences else 0
        return abs(counts.total - counts.free - counts.cached - owned)

    def holdings(self) -> list[Sequence]:
        """Every sequence that is not finished, by request id."""
        return [self._sequences[request_id] for request_id in sorted(self._sequences)]

    # --- parts of the above ---

    def _enter(self, sequence: Sequence) -> None:
        if sequence.request_id in self._sequences:
            raise InvalidRequest(f"request id {sequence.request_id} is already live here; ids must be unique")
        self._sequences[sequence.request_id] = sequence
        self._arrivals += 1

    def _admissible(self, logits_left: int = MAX_PROMPT_LOGITS) -> list[int] | None:
        """The blocks that the cache holds of the first waiting sequence; None if nobody can be admitted now."""
        self._starved = False
        if not self._waiting or len(self._running) + self.num_in(SequenceState.RESERVED) >= self._max_running:
            return None
        sequence = self._waiting[0]
        if sequence.needs_prompt_logits and not logits_left:
            return None
        hits = self._tables.cached(sequence, 0 if sequence.needs_prompt_logits else sequence.num_tokens - 1)
        needed = blocks_for(sequence.num_tokens, self.blocks.block_size) - len(hits)
        if not self.blocks.can_allocate(needed, hits):
            self._starved = True  # and nobody behind it may overtake, or it would wait for ever
            return None
        return hits

    def _admit(self, logits_left: int) -> Sequence | None:
        """Move the first waiting sequence into the running batch with blocks for all its known tokens."""
        hits = self._admissible(logits_left)
        if hits is None:
            return None
        sequence = self._waiting.pop(0)
        self._tables.fill(sequence, hits, sequence.num_tokens)
        sequence.num_computed = sequence.num_cached
        self.cached_tokens += sequence.num_cached
        sequence.state = SequenceState.RUNNING
        insort(self._running, sequence, key=_queue_key)
        return sequence

    def _must_preempt(self, sequence: Sequence) -> bool:
        """Whether a decoding sequence needs a block for its next token that nobody has left."""
        full = len(sequence.block_table) * self.blocks.block_size < sequence.num_tokens
        return full and not self.blocks.can_allocate(1)

    def _grow(self, sequence: Sequence) -> bool:
        """Give a decoding sequence the block of its next token, if need be at the cost of those behind it."""
        while len(sequence.block_table) * self.blocks.block_size < sequence.num_tokens:
            if self.blocks.can_allocate(1):
                sequence.block_table += self.blocks.allocate(1)
                continue
            # A prefill-only sequence may be in mid-transfer, so it is never the victim.
            victim = next(s for s in reversed(self._running) if not s.prefill_only)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._tables.clear(sequence)
        sequence.num_computed = sequence.num_published = 0
        sequence.state = SequenceState.WAITING
        sequence.preempted = True
        insort(self._waiting, sequence, key=_waiting_key)
        self._preempted.append(sequence)
        self._starved = True
        self.num_preemptions += 1

    def _finish(self, sequence: Sequence) -> None:
        """Free what a sequence has, once no planned step uses it."""
        sequence.released = True
        if sequence.num_in_flight:
            return
        if sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
        elif sequence.state is SequenceState.RUNNING:
            self._running.remove(sequence)
        self._tables.clear(sequence)
        sequence.state = SequenceState.FINISHED
        del self._sequences[sequence.request_id]


def _queue_key(sequence: Sequence) -> tuple[int, float, int]:
    return sequence.queue_key


def _waiting_key(sequence: Sequence) -> tuple[bool, tuple[int, float, int]]:
    """Who has been preempted comes back before anybody begins, or a stream of more important ones would starve it."""
    return not sequence.preempted, sequence.queue_key


def _advance(part: ScheduledTokens) -> None:
    """What is known of a sequence as soon as its step is planned."""
    sequence = part.sequence
    sequence.num_in_flight += 1
    sequence.num_computed = part.end
    if part.samples:
        sequence.token_ids.append(PENDING)
        sequence.complete = sequence.prefill_only or sequence.num_output >= sequence.request.max_tokens
