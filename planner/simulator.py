"""Discrete-event simulation of a cluster: the schedulers, placement and admission that serve, under a latency model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ..core.config import EngineConfig, RouterConfig
from ..core.errors import ConfigError, SplitserveError
from ..core.events import Event
from ..scheduling.admission import Admission, AdmissionPolicy
from ..scheduling.fair_queue import Ticket
from ..scheduling.policies.prefix import prefix
from ..scheduling.routing import RoutingPolicy
from ..scheduling.step_plan import StepPlan
from .event_queue import EventQueue
from .kv_link import KvLinks
from .request_life import RequestLife
from .simulated_router import SimulatedRouter
from .simulated_worker import SimulatedWorker
from .simulation_result import SimulationResult, summarize_lives
from .trace_contents import TraceContents
from .types import ClusterSpec, PoolSpec, SimRequest

_MAX_BLOCK_TOKENS = 512
_BLOCKS_PER_REQUEST = 24  # of the mean request; what is lost by rounding up to whole blocks is about 2 % at most


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterLimits:
    """What the router's configuration sets; the same defaults."""

    max_queued: int = RouterConfig().max_queued
    max_live: int = RouterConfig().max_live
    prefill_bound_s: float = RouterConfig().prefill_bound_s
    admission: AdmissionPolicy = RouterConfig().admission
    ttft_target_s: float | None = None
    tpot_target_s: float | None = None
    ageing_s: float = RouterConfig().ageing_s
    local_prefill_itl_s: float | None = None


def simulate(
    cluster: ClusterSpec,
    requests: Sequence[SimRequest],
    *,
    seed: int = 0,
    limits: RouterLimits | None = None,
    policy: RoutingPolicy = prefix,
    block_tokens: int | None = None,
    on_progress: Callable[[int], None] = lambda num_ended: None,
) -> SimulationResult:
    """Replay the requests on the cluster.

    Args:
        seed: of the policy's chance; the default policy has none.
        policy: chooses workers.
        block_tokens: tokens of a simulated KV block; None: about a 24th of the mean request, since cost grows with the
            number of blocks. A multiple of both pools' block size.
        on_progress: called now and then with the number of requests that have ended.
    Raises: ConfigError: there is nothing to simulate, or a block size does not fit.
    """
    if not requests:
        raise ConfigError("there are no requests to simulate; give a trace or a rate")
    return Simulation(
        cluster,
        requests,
        seed=seed,
        limits=limits,
        policy=policy,
        block_tokens=block_tokens,
        on_progress=on_progress,
    ).run()


class Simulation:
    """One run. Its workers may change meanwhile: `at` runs an action at a time, and the action adds or retires some."""

    def __init__(
        self,
        cluster: ClusterSpec,
        requests: Sequence[SimRequest],
        *,
        seed: int = 0,
        limits: RouterLimits | None = None,
        policy: RoutingPolicy = prefix,
        block_tokens: int | None = None,
        on_progress: Callable[[int], None] = lambda num_ended: None,
    ) -> None:
        limits = limits or RouterLimits()
        self.cluster = cluster
        self.queue = EventQueue()
        self.links = KvLinks(cluster.link_bytes_per_s)
        self.workers: dict[str, SimulatedWorker] = {}  # every one that ever was
        self._requests = sorted(enumerate(requests), key=lambda item: item[1].arrival_s)
        self._block_tokens = block_tokens or _block_tokens(cluster, requests)
        for pool in (cluster.prefill, cluster.decode):
            if pool is not None and self._block_tokens % pool.worker.block_size:
                raise ConfigError(
                    f"block_tokens is {self._block_tokens}; it must be a multiple of the block size "
                    f"{pool.worker.block_size}"
                )
        self._contents = TraceContents(self._block_tokens)
        self.router = SimulatedRouter(
            self.queue,
            Admission(
                max_queued=limits.max_queued,
                max_live=limits.max_live,
                policy=limits.admission,
                ttft_target_s=limits.ttft_target_s,
            ),
            policy,
            prefill_bound_s=limits.prefill_bound_s,
            tpot_target_s=limits.tpot_target_s,
            ageing_s=limits.ageing_s,
            local_prefill_itl_s=limits.local_prefill_itl_s,
            kv_bytes_per_token=cluster.kv_bytes_per_token,
            ttft_target_s=limits.ttft_target_s,
            prompt_hashes=self._contents.prompt_hashes,
            rng=random.Random(seed),
            on_failed=self._failed,
        )
        self._lives: dict[str, RequestLife] = {}  # those that a worker may name
        self._all: list[RequestLife] = []
        self._num_arrived = 0
        self._num_ended = 0
        self._on_progress = on_progress
        self._progress_every = max(1, len(requests) // 200)
        if cluster.prefill is not None:
            for _ in range(cluster.prefill.num_workers):
                self.add_prefill_worker()
        for _ in range(cluster.decode.num_workers):
            self.add_decode_worker()

    def run(self) -> SimulationResult:
        self._ask_for_next_arrival()
        self.queue.run()
        self._on_progress(self._num_ended)
        lives = sorted(self._all, key=lambda life: life.index)
        return summarize_lives(self.cluster, lives, self.workers, self.links)

    # --- workers ---

    def at(self, time_s: float, action: Callable[[], object]) -> None:
        """Do something to the simulation at a time."""
        self.queue.at(time_s, action)

    def add_prefill_worker(self) -> str:
        """A further worker of the prefill pool, at once; its name."""
        assert self.cluster.prefill is not None, "a colocated cluster has no prefill pool"
        worker = self._new_worker("prefill", self.cluster.prefill)
        self.router.add_prefill(worker)
        return worker.name

    def add_decode_worker(self) -> str:
        """A further worker of the decode pool, at once; its name."""
        colocated = self.cluster.prefill is None
        worker = self._new_worker("colocated" if colocated else "decode", self.cluster.decode)
        self.router.add_decode(worker, colocated=colocated)
        return worker.name

    def retire_worker(self, name: str) -> None:
        """It finishes what it has and gets nothing more."""
        self.router.retire(name)

    def _new_worker(self, role: str, pool: PoolSpec) -> SimulatedWorker:
        number = sum(1 for name in self.workers if name.startswith(role))
        worker = self.workers[f"{role}-{number}"] = SimulatedWorker(
            f"{role}-{number}",
            pool.worker,
            self.queue,
            self,
            self._contents,
            self._lives,
            block_size=self._block_tokens,
            max_waiting=EngineConfig().max_waiting,
            headroom_tokens=EngineConfig().decode_headroom_tokens,
            prefix_cache=self.cluster.prefix_cache,
        )
        return worker

    # --- the life of a request ---

    def _ask_for_next_arrival(self) -> None:
        if self._num_arrived < len(self._requests):
            self.queue.at(self._requests[self._num_arrived][1].arrival_s, self._arrive)

    def _arrive(self) -> None:
        index, request = self._requests[self._num_arrived]
        self._num_arrived += 1
        self._ask_for_next_arrival()
        request_id = str(index)
        ticket = Ticket(
            order=index,
            arrived_at=request.arrival_s,
            cost=request.isl,
            tenant=request.tenant,
            priority=request.priority,
        )
        work = self._contents.enter(request_id, request)
        life = RequestLife(index=index, request=request, work=work, ticket=ticket)
        self._all.append(life)
        self._lives[request_id] = life
        life.mark(Event.ARRIVED, self.queue.now_s)
        if self.router.admit(life):
            if self.cluster.router_s > 0:
                self.queue.at(self.queue.now_s + self.cluster.router_s, partial(self.router.enqueue, life))
            else:
                self.router.enqueue(life)

    def step_started(self, worker: SimulatedWorker, plan: StepPlan, *, from_s: float, until_s: float) -> None:
        """KV of the step's chunks goes on its way layer by layer."""
        if not plan.parts[0].sequence.prefill_only:
            return  # and then nobody on that worker is
        for part in plan.parts:
            life = self._lives[part.sequence.request_id]
            num_tokens = max(0, part.end - life.num_sent)
            transit = self.links.send(
                worker.name,
                life.decode,
                num_tokens * self.cluster.kv_bytes_per_token,
                from_s=from_s,
                until_s=until_s,
            )
            life.num_sent += num_tokens
            if life.transfer_started_s is None:
                life.transfer_started_s = transit.started_s
            life.transfer_finished_s = transit.finished_s
            if part.samples:
                life.transfer_finished_s += self.cluster.link_latency_s
                self.queue.at(life.transfer_finished_s, partial(self._transferred, life))

    def first_token(self, worker: SimulatedWorker, life: RequestLife, at_s: float) -> None:
        life.mark(Event.FIRST_TOKEN, at_s)
        self.router.prefilled(life)
        if life.request.osl == 1 and life.prefill is not None:
            self._ended(life, at_s)  # its KV still moves, and then both sides free it

    def _transferred(self, life: RequestLife) -> None:
        assert life.prefill is not None
        assert life.transfer_started_s is not None
        life.mark(Event.TRANSFER_STARTED, life.transfer_started_s)
        life.mark(Event.TRANSFER_FINISHED, life.transfer_finished_s)
        self.workers[life.prefill].release(life.request_id)
        decode = self.workers[life.decode]
        if life.request.osl == 1:
            decode.release(life.request_id)
            self.router.freed(life)
            self._forget(life)
        else:
            life.mark(Event.DECODE_QUEUED, life.transfer_finished_s)
            decode.start_reserved(life)

    def finished(self, worker: SimulatedWorker, life: RequestLife, at_s: float) -> None:
        self._ended(life, at_s)
        self._forget(life)
        self.router.freed(life)

    def _ended(self, life: RequestLife, at_s: float) -> None:
        life.ended_s = at_s
        life.mark(Event.FINISHED, at_s)
        self.router.ended(life)
        self._count_end()

    def _failed(self, life: RequestLife, error: SplitserveError) -> None:
        life.error = error.code
        life.ended_s = self.queue.now_s
        life.mark(Event.FAILED, self.queue.now_s)
        self._forget(life)
        self._count_end()

    def _forget(self, life: RequestLife) -> None:
        del self._lives[life.request_id]
        self._contents.leave(life.request_id)

    def _count_end(self) -> None:
        self._num_ended += 1
        if self._num_ended % self._progress_every == 0:
            self._on_progress(self._num_ended)


def _block_tokens(cluster: ClusterSpec, requests: Sequence[SimRequest]) -> int:
    """A power of two times the pools' block size, so that the mean request has some dozens of blocks."""
    sizes = [pool.worker.block_size for pool in (cluster.prefill, cluster.decode) if pool is not None]
    size = max(sizes) if max(sizes) % min(sizes) == 0 else sizes[0] * sizes[-1]
    wanted = sum(request.isl + request.osl for request in requests) / len(requests) / _BLOCKS_PER_REQUEST
    while size * 2 <= min(wanted, _MAX_BLOCK_TOKENS):
        size *= 2
    return size
