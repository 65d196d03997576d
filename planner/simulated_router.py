"""The router of a simulation: real admission and real placement over the loads of simulated workers."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from typing import Protocol

from ..core.errors import Overloaded, PromptTooLong, SplitserveError
from ..core.events import Event
from ..core.kv_geometry import blocks_for
from ..core.request import Request
from ..scheduling.admission import Admission
from ..scheduling.routing import DecodeLoad, Placement, PrefillLoad, place
from .event_queue import EventQueue
from .request_life import RequestLife
from .simulated_worker import SimulatedWorker


class PlacementPolicy(Protocol):
    """Chooses the pair for a request, or None: it waits. `rng` is the only source of chance."""

    def __call__(
        self,
        request: Request,
        prefills: Sequence[PrefillLoad],
        decodes: Sequence[DecodeLoad],
        *,
        any_prefill_alive: bool,
        prefill_bound_s: float,
        rng: random.Random,
    ) -> Placement | None: ...


def default_policy(
    request: Request,
    prefills: Sequence[PrefillLoad],
    decodes: Sequence[DecodeLoad],
    *,
    any_prefill_alive: bool,
    prefill_bound_s: float,
    rng: random.Random,
) -> Placement | None:
    """What the router does."""
    return place(prefills, decodes, any_prefill_alive=any_prefill_alive, prefill_bound_s=prefill_bound_s)


class _Member:
    """A worker as the router sees it: what it last told of itself, and what was sent there since."""

    def __init__(self, worker: SimulatedWorker) -> None:
        self.worker = worker
        self.full = False  # it refused; asked again when something ends there
        self.retired = False

    @property
    def takes_work(self) -> bool:
        return not (self.full or self.retired)


class _PrefillMember(_Member):
    def __init__(self, worker: SimulatedWorker) -> None:
        super().__init__(worker)
        self._outstanding_tokens = self._outstanding_prompts = 0  # sent there and without a first token
        self._load: PrefillLoad | None = None  # None: it has changed

    def attach(self, num_tokens: int) -> None:
        self._outstanding_tokens += num_tokens
        self._outstanding_prompts += 1
        self._load = None

    def prefilled(self, num_tokens: int) -> None:
        self._outstanding_tokens -= num_tokens
        self._outstanding_prompts -= 1
        self._load = None
        self.full = False

    @property
    def load(self) -> PrefillLoad:
        if self._load is None:
            self._load = PrefillLoad(
                worker=self.worker.name,
                outstanding_tokens=self._outstanding_tokens,
                outstanding_prompts=self._outstanding_prompts,
                tokens_per_s=self.worker.prefill_tokens_per_s,
            )
        return self._load


class _DecodeMember(_Member):
    def __init__(self, worker: SimulatedWorker, *, colocated: bool) -> None:
        super().__init__(worker)
        self._colocated = colocated
        self._available_blocks = worker.scheduler.blocks.num_available
        self._num_sequences = 0
        self._num_runs = 0
        self._load: DecodeLoad | None = None

    def attach(self, num_blocks: int) -> None:
        self._available_blocks -= num_blocks
        self._num_runs += 1
        self._load = None

    def freed(self) -> None:
        """Something ended there, and it told how it stands now."""
        self._available_blocks = self.worker.scheduler.blocks.num_available
        self._num_sequences = self.worker.num_sequences
        self._num_runs -= 1
        self._load = None
        self.full = False

    @property
    def load(self) -> DecodeLoad:
        if self._load is None:
            self._load = DecodeLoad(
                worker=self.worker.name,
                available_blocks=self._available_blocks,
                num_sequences=max(self._num_sequences, self._num_runs),
                colocated=self._colocated,
            )
        return self._load


class SimulatedRouter:
    """Queue, placement and grants.

    Args:
        on_failed: told of a request that ends without an answer.
    """

    def __init__(
        self,
        queue: EventQueue,
        admission: Admission,
        policy: PlacementPolicy,
        *,
        prefill_bound_s: float,
        rng: random.Random,
        on_failed: Callable[[RequestLife, SplitserveError], None],
    ) -> None:
        self._events = queue
        self._admission = admission
        self._policy = policy
        self._prefill_bound_s = prefill_bound_s
        self._rng = rng
        self._on_failed = on_failed
        self._prefills: dict[str, _PrefillMember] = {}
        self._decodes: dict[str, _DecodeMember] = {}
        self._queue: list[tuple[int, RequestLife]] = []  # heap in order of arrival
        self._num_admitted = 0  # and not queued yet: on their way through the router
        self.num_live = 0

    # --- workers ---

    def add_prefill(self, worker: SimulatedWorker) -> None:
        self._prefills[worker.name] = _PrefillMember(worker)
        self.pump()

    def add_decode(self, worker: SimulatedWorker, *, colocated: bool) -> None:
        self._decodes[worker.name] = _DecodeMember(worker, colocated=colocated)
        self.pump()

    def retire(self, name: str) -> None:
        """Send nothing more there; what it runs goes on."""
        (self._prefills.get(name) or self._decodes[name]).retired = True

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    # --- requests ---

    def admit(self, life: RequestLife) -> bool:
        """Let a request in, or fail it."""
        try:
            self._admission.check(num_queued=len(self._queue) + self._num_admitted, num_live=self.num_live)
        except Overloaded as error:
            self._on_failed(life, error)
            return False
        self.num_live += 1
        self._num_admitted += 1
        life.mark(Event.ADMITTED, self._events.now_s)
        return True

    def enqueue(self, life: RequestLife) -> None:
        """An admitted request is ready for dispatch."""
        self._num_admitted -= 1
        heapq.heappush(self._queue, (life.index, life))
        self.pump()

    def prefilled(self, life: RequestLife) -> None:
        """It has its first token."""
        if life.prefill is not None:
            self._prefills[life.prefill].prefilled(life.request.isl)
        self.pump()

    def freed(self, life: RequestLife) -> None:
        """It let go of what it had on its decode worker."""
        self._decodes[life.decode].freed()
        self.pump()

    def ended(self) -> None:
        """A live request ended."""
        self.num_live -= 1
        self._admission.left(self._events.now_s)

    def pump(self) -> None:
        """Dispatch from the head of the queue while there is a pair for it."""
        while self._queue:
            life = self._queue[0][1]
            placement = self._policy(
                life.work,
                [member.load for member in self._prefills.values() if member.takes_work],
                [member.load for member in self._decodes.values() if member.takes_work],
                any_prefill_alive=any(not member.retired for member in self._prefills.values()),
                prefill_bound_s=self._prefill_bound_s,
                rng=self._rng,
            )
            if placement is None:
                return
            heapq.heappop(self._queue)
            if not self._start(life, placement):
                heapq.heappush(self._queue, (life.index, life))

    def _start(self, life: RequestLife, placement: Placement) -> bool:
        """Begin at the chosen pair; False: one of them has no room now."""
        decode = self._decodes[placement.decode]
        prefill = self._prefills[placement.prefill] if placement.prefill is not None else None
        life.decode, life.prefill = placement.decode, placement.prefill
        if error := _never_fits(life, decode.worker, prefill.worker if prefill is not None else None):
            self.ended()
            self._on_failed(life, error)
            return True
        now_s = self._events.now_s
        try:
            if prefill is None:
                life.mark(Event.PREFILL_QUEUED, now_s)
                decode.worker.add(life.work)
            else:
                life.num_sent = decode.worker.reserve(life.work).num_cached
        except Overloaded:
            decode.full = True
            return False
        if prefill is not None:
            life.mark(Event.GRANTED, now_s)
            life.mark(Event.PREFILL_QUEUED, now_s)
            try:
                prefill.worker.add(life.work, prefill_only=True)
            except Overloaded:
                prefill.full = True
                decode.worker.release(life.request_id)
                return False
            prefill.attach(life.request.isl)
        decode.attach(blocks_for(life.request.isl, decode.worker.scheduler.blocks.block_size))
        return True


def _never_fits(life: RequestLife, decode: SimulatedWorker, prefill: SimulatedWorker | None) -> PromptTooLong | None:
    """Why a request cannot be served however long it waits."""
    request = life.request
    if request.isl + request.osl > decode.max_tokens:
        return _too_long(decode, request.isl + request.osl)
    if prefill is not None and request.isl > prefill.max_tokens:
        return _too_long(prefill, request.isl)
    return None


def _too_long(worker: SimulatedWorker, num_tokens: int) -> PromptTooLong:
    blocks = worker.scheduler.blocks
    return PromptTooLong(
        f"the request's {num_tokens:,} tokens need {blocks_for(num_tokens, blocks.block_size):,} KV blocks, "
        f"{worker.name} has {blocks.num_blocks:,}; shorten it or give the worker more memory"
    )
