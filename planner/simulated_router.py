"""The router of a simulation: real admission, policies and prefix index over the loads of simulated workers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from ..core.errors import Overloaded, PromptTooLong, SplitserveError
from ..core.events import Event
from ..core.kv_geometry import blocks_for
from ..scheduling.admission import Admission
from ..scheduling.decode_pace import DecodePace
from ..scheduling.dispatch_order import dispatch
from ..scheduling.fair_queue import FairQueue
from ..scheduling.prefix_feed import PrefixFeed, block_key
from ..scheduling.prefix_index import PrefixIndex
from ..scheduling.ranked_loads import DecodeLoads, PrefillLoads
from ..scheduling.routing import ClusterView, DecodeLoad, Placement, PrefillLoad, RoutedRequest, RoutingPolicy, Snapshot
from ..scheduling.step_times import MeasuredTimes
from .event_queue import EventQueue
from .request_life import RequestLife
from .simulated_worker import SimulatedWorker
from .types import SimRequest


class _Member:
    """A worker as the router sees it: what it last told of itself, and what was sent there since."""

    def __init__(self, worker: SimulatedWorker) -> None:
        self.worker = worker
        self.full = False  # it refused; asked again when something ends there
        self.retired = False
        blocks = worker.scheduler.blocks
        self.feed: PrefixFeed | None = blocks.follow() if blocks.has_prefix_cache else None

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
    def __init__(self, worker: SimulatedWorker, *, colocated: bool, pace: DecodePace) -> None:
        super().__init__(worker)
        self._colocated = colocated
        self._local_tokens = 0  # of prompts that it still has to compute
        self._pace = pace
        self._available_blocks = worker.scheduler.blocks.num_available
        self._num_sequences = 0
        self._num_runs = 0
        self._decode_step = (0, 0.0)
        self._load: DecodeLoad | None = None

    def attach(self, num_blocks: int, local_tokens: int) -> None:
        self._available_blocks -= num_blocks
        self._num_runs += 1
        self._local_tokens += local_tokens
        self._load = None

    def prefilled(self, local_tokens: int) -> None:
        """It computed a prompt by itself."""
        self._local_tokens -= local_tokens
        self._load = None

    def freed(self) -> None:
        """Something ended there, and it told how it stands now."""
        self._available_blocks = self.worker.scheduler.blocks.num_available
        self._num_sequences = self.worker.num_sequences
        self._decode_step = self.worker.decode_step
        self._pace.report(*self.worker.decode_step)
        self._num_runs -= 1
        self._load = None
        self.full = False

    @property
    def takes_work(self) -> bool:
        return super().takes_work and self._pace.has_room(max(self._num_sequences, self._num_runs))

    @property
    def load(self) -> DecodeLoad:
        if self._load is None:
            self._load = DecodeLoad(
                worker=self.worker.name,
                available_blocks=self._available_blocks,
                num_sequences=max(self._num_sequences, self._num_runs),
                num_blocks=self.worker.scheduler.blocks.num_blocks,
                block_size=self.worker.scheduler.blocks.block_size,
                local_prefill_tokens=self._local_tokens,
                times=MeasuredTimes(
                    prefill_tokens_per_s=self.worker.prefill_tokens_per_s,
                    decode_step_time_s=self._decode_step[1],
                    decode_batch=self._decode_step[0],
                ),
                colocated=self._colocated,
                prefills_locally=True,
            )
        return self._load

    @property
    def prefill_load(self) -> PrefillLoad:
        """As one that computes prompts itself."""
        return PrefillLoad(
            worker=self.worker.name,
            outstanding_tokens=self.worker.scheduler.outstanding_prefill_tokens,
            outstanding_prompts=self.worker.scheduler.num_waiting,
            tokens_per_s=self.worker.prefill_tokens_per_s,
        )


class SimulatedRouter:
    """Queue, placement and grants. Implements `scheduling.dispatch_order.Source`.

    Args:
        prompt_hashes: of each full KV block of a request's prompt, by request id.
        tpot_target_s: longest decode step that new sequences may bring about; None: any.
        ageing_s: waiting that is worth one step of priority.
        on_failed: told of a request that ends without an answer.
    """

    def __init__(
        self,
        queue: EventQueue,
        admission: Admission,
        policy: RoutingPolicy,
        *,
        prefill_bound_s: float,
        local_prefill_itl_s: float | None,
        kv_bytes_per_token: float,
        ttft_target_s: float | None,
        prompt_hashes: Callable[[str], Sequence[bytes]],
        tpot_target_s: float | None,
        ageing_s: float,
        rng: random.Random,
        on_failed: Callable[[RequestLife, SplitserveError], None],
    ) -> None:
        self._events = queue
        self._admission = admission
        self._prefill_bound_s = prefill_bound_s
        self._local_prefill_itl_s = local_prefill_itl_s
        self._kv_bytes_per_token = kv_bytes_per_token
        self._ttft_target_s = ttft_target_s
        self._prompt_hashes = prompt_hashes
        self._index = PrefixIndex()
        self._policy = policy
        self._rng = rng
        self._on_failed = on_failed
        self._prefills: dict[str, _PrefillMember] = {}
        self._decodes: dict[str, _DecodeMember] = {}
        self._num_prefills = 0  # that are not retired
        self._prefill_loads = PrefillLoads(prefill_bound_s)
        self._decode_loads = DecodeLoads()
        self._changed: dict[str, _PrefillMember | _DecodeMember] = {}  # since those were told
        self._tpot_target_s = tpot_target_s
        self._queue: FairQueue[RequestLife] = FairQueue(ageing_s)
        self._num_admitted = 0  # and not queued yet: on their way through the router
        self.num_live = 0

    # --- workers ---

    def add_prefill(self, worker: SimulatedWorker) -> None:
        self._prefills[worker.name] = self._changed[worker.name] = _PrefillMember(worker)
        self._num_prefills += 1
        self.pump()

    def add_decode(self, worker: SimulatedWorker, *, colocated: bool) -> None:
        member = _DecodeMember(worker, colocated=colocated, pace=DecodePace(self._tpot_target_s))
        self._decodes[worker.name] = self._changed[worker.name] = member
        self.pump()

    def retire(self, name: str) -> None:
        """Send nothing more there; what it runs goes on."""
        member = self._prefills.get(name) or self._decodes[name]
        member.retired = True
        self._changed[name] = member
        self._num_prefills -= name in self._prefills

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    # --- requests ---

    def admit(self, life: RequestLife) -> bool:
        """Let a request in, or fail it."""
        try:
            life.predicted_ttft_s = self._admission.admit(
                life.ticket,
                deadline_at=math.inf,
                queue=self._queue,
                num_arriving=self._num_admitted,
                num_live=self.num_live,
                prefills=self._computing(),
            )
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
        life.draw = self._rng.getrandbits(64)
        life.prefix_keys = [block_key(found) for found in self._prompt_hashes(life.request_id)]
        life.waits = True
        self._queue.push(life.ticket, life)
        self.pump()
        if life.waits and self._admission.ttft_target_s < math.inf:
            at_s = self._admission.latest_start(life.ticket, deadline_at=math.inf, prefills=self._computing())
            self._events.at(at_s, partial(self._too_late, life))

    def prefilled(self, life: RequestLife) -> None:
        """It has its first token."""
        if life.predicted_ttft_s is not None:
            self._admission.ttft.measured(life.predicted_ttft_s, self._events.now_s - life.request.arrival_s)
        member: _PrefillMember | _DecodeMember
        member = self._prefills[life.prefill] if life.prefill is not None else self._decodes[life.decode]
        member.prefilled(life.num_uncached)
        self._changed[member.worker.name] = member
        self._read_feed(member)
        self.pump()

    def freed(self, life: RequestLife) -> None:
        """It let go of what it had on its decode worker."""
        member = self._decodes[life.decode]
        member.freed()
        self._changed[life.decode] = member
        self._read_feed(member)
        self.pump()

    def ended(self, life: RequestLife) -> None:
        """A live request ended."""
        self._queue.charge(life.ticket, 0 if life.error else life.request.osl)
        self.num_live -= 1
        self._admission.left(self._events.now_s, arrived_at=life.ticket.arrived_at)

    def pump(self) -> None:
        """Send off what can be."""
        if len(self._queue):  # else most of a large simulation's time would go into views for nobody
            dispatch(self._policy, self, self._events.now_s)

    def _computing(self) -> list[PrefillLoad]:
        """Of everybody who computes prompts, whether or not it takes one more right now; none if nobody asks."""
        if self._admission.ttft_target_s == math.inf:
            return []
        loads = [member.load for member in self._prefills.values() if not member.retired]
        return loads or [member.prefill_load for member in self._decodes.values() if not member.retired]

    def _starts_in_time(self, life: RequestLife) -> bool:
        """Whether its work would still be worth something; ends it otherwise."""
        try:
            self._admission.check_start(
                life.ticket, now=self._events.now_s, deadline_at=math.inf, prefills=self._computing()
            )
        except Overloaded as error:
            self._refuse(life, error)
            return False
        return True

    def _too_late(self, life: RequestLife) -> None:
        """It waited in the queue until there was no point in waiting longer."""
        if life.waits:
            self._refuse(life, self._admission.too_late(len(self._queue)))
            self.pump()

    def _refuse(self, life: RequestLife, error: Overloaded) -> None:
        life.waits = False
        self._queue.discard(life.ticket)
        if not len(self._queue):
            self._admission.ttft.emptied()
        self._on_failed(life, error)
        self.ended(life)

    # --- of dispatch_order.Source ---

    def in_order(self) -> Iterator[RequestLife]:
        return self._queue.in_order()

    def view(self) -> ClusterView:
        for name, member in self._changed.items():
            if isinstance(member, _PrefillMember):
                self._prefill_loads.put(name, member.load if member.takes_work else None)
            else:
                self._decode_loads.put(name, member.load if member.takes_work else None)
        self._changed.clear()
        return ClusterView(
            prefills=self._prefill_loads,
            decodes=self._decode_loads,
            any_prefill_alive=self._num_prefills > 0,
            prefill_bound_s=self._prefill_bound_s,
            kv_bytes_per_token=self._kv_bytes_per_token,
            local_prefill_itl_s=self._local_prefill_itl_s,
        )

    def snapshot(self, job: RequestLife, view: ClusterView, held_tokens: Mapping[str, int]) -> Snapshot:
        slack_s = self._ttft_target_s
        if slack_s is not None:
            slack_s -= self._events.now_s - job.request.arrival_s
        return Snapshot(
            request=RoutedRequest(
                num_tokens=job.request.isl,
                turn=job.index,
                draw=job.draw,
                session=_session(job.request),
                ttft_slack_s=slack_s,
            ),
            view=view,
            cached_tokens=self._cached_tokens(job),
            held_tokens=held_tokens,
        )

    def _cached_tokens(self, life: RequestLife) -> Mapping[str, int]:
        """What the index says of the prompt; asked again only after it has changed."""
        if not life.prefix_keys:
            return {}
        if life.matched_at != self._index.version:
            life.matched_at = self._index.version
            members: Mapping[str, _Member] = {**self._prefills, **self._decodes}
            life.cached_tokens = {
                name: num_blocks * members[name].worker.scheduler.blocks.block_size
                for name, num_blocks in self._index.match(life.prefix_keys).items()
            }
        return life.cached_tokens

    def _read_feed(self, member: _Member) -> None:
        """A status came, and with it what changed in the worker's prefix index."""
        if member.feed is not None:
            while (changes := member.feed.take()) is not None:
                self._index.apply(member.worker.name, changes)

    def start(self, job: RequestLife, placement: Placement) -> None:
        if self._admission.ttft_target_s < math.inf and not self._starts_in_time(job):
            return
        if self._begin(job, placement):
            self._queue.serve(job.ticket)
            job.waits = False

    def _begin(self, life: RequestLife, placement: Placement) -> bool:
        """Begin at the chosen pair; False: one of them has no room now."""
        decode = self._changed[placement.decode] = self._decodes[placement.decode]
        prefill = self._prefills[placement.prefill] if placement.prefill is not None else None
        if prefill is not None:
            self._changed[prefill.worker.name] = prefill
        life.decode, life.prefill = placement.decode, placement.prefill
        computed_by = placement.prefill or placement.decode
        life.num_uncached = max(1, life.request.isl - self._cached_tokens(life).get(computed_by, 0))
        if error := _never_fits(life, decode.worker, prefill.worker if prefill is not None else None):
            self._on_failed(life, error)
            self.ended(life)
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
            prefill.attach(life.num_uncached)
        decode.attach(
            blocks_for(life.request.isl, decode.worker.scheduler.blocks.block_size),
            life.num_uncached if prefill is None else 0,
        )
        self._admission.ttft.dispatched(now_s, life.ticket.cost, len(self._queue) - 1)
        return True


def _session(request: SimRequest) -> bytes:
    """Of a trace: the first block that not everybody begins with."""
    return b"%d" % request.hash_ids[min(1, len(request.hash_ids) - 1)] if request.hash_ids else b""


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
