"""What the router tells its routing policy: loads of the workers that take work, one request, and who has cached it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ..core.kv_geometry import PREFIX_UNIT
from ..core.metrics import RouterMetrics
from ..core.request import Request
from ..proto import worker_pb2
from ..scheduling.fair_queue import Ticket
from ..scheduling.pairing import groups_of, one_group
from ..scheduling.prefix import prefix_namespace
from ..scheduling.prefix_index import PrefixIndex
from ..scheduling.prompt_keys import PromptKeys
from ..scheduling.ranked_loads import DecodeLoads, PrefillLoads
from ..scheduling.routing import ClusterView, Placement, RoutedRequest, Snapshot
from .membership import WorkerPool
from .session import WorkerLink


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hashing:
    """Workers that agree in this name blocks alike."""

    model_id: str
    kv_dtype: str
    block_size: int

    @classmethod
    def of(cls, info: worker_pb2.WorkerInfo) -> _Hashing:
        return cls(model_id=info.prefix_model_id, kv_dtype=info.kv_dtype, block_size=info.block_size or PREFIX_UNIT)


@dataclass(slots=True)
class PrefixOfJob:
    """A request's prompt as the index knows it; looked up again when the index has changed."""

    prompts: dict[_Hashing, PromptKeys] = field(default_factory=dict)
    session: bytes = b""
    cached_tokens: Mapping[str, int] = field(default_factory=dict)  # by worker
    version: int = -1  # of the index that said so


class RoutedJob(Protocol):
    """The dispatcher's request, as far as routing needs it."""

    request: Request
    ticket: Ticket
    deadline_at: float
    draw: int
    avoid: set[str]
    prefix: PrefixOfJob

    @property
    def weights(self) -> str:
        """What computed the tokens that its client has; "" while it has none of ours."""
        ...


class RoutingView:
    """Makes snapshots of one router's workers, and keeps the index of their prefix caches.

    Args:
        prefill_bound_s: seconds of prefill work that a worker may have outstanding.
        local_prefill_itl_s: longest gap between tokens that a prompt computed on its decode worker may cause; None:
            every prompt goes to a prefill worker.
        ttft_target_s: after which a first token is late.
    """

    def __init__(
        self,
        pool: WorkerPool,
        metrics: RouterMetrics,
        *,
        prefill_bound_s: float,
        local_prefill_itl_s: float | None,
        ttft_target_s: float,
    ) -> None:
        self._pool = pool
        self._metrics = metrics
        self._prefill_bound_s = prefill_bound_s
        self._local_prefill_itl_s = local_prefill_itl_s
        self._ttft_target_s = ttft_target_s
        self._prefills = PrefillLoads(prefill_bound_s)
        self._decodes = DecodeLoads()
        self.index = PrefixIndex()  # by address
        metrics.prefix_blocks.set_function(lambda: len(self.index))

    def view(self) -> ClusterView:
        pool = self._pool
        prefills, decodes = self._prefills, self._decodes
        prefills.put_all({link.address: link.load for link in pool.prefills.values() if link.takes_work})
        decodes.put_all({link.address: link.load for link in pool.decodes.values() if link.takes_work})
        groups = groups_of(prefills, decodes)
        alive = {link.group for link in pool.prefills.values() if link.state == "ready"} if len(groups) > 1 else ()
        return ClusterView(
            prefills=prefills,
            decodes=decodes,
            groups=groups,
            alive_groups=frozenset(group for group in alive if group is not None),
            any_prefill_alive=pool.any_prefill_alive,
            prefill_bound_s=self._prefill_bound_s,
            kv_bytes_per_token=pool.kv_bytes_per_token,
            local_prefill_itl_s=self._local_prefill_itl_s,
        )

    def snapshot(self, job: RoutedJob, view: ClusterView, held_tokens: Mapping[str, int]) -> Snapshot:
        cached_tokens = self._cached_tokens(job)
        late_at = min(job.ticket.arrived_at + self._ttft_target_s, job.deadline_at)
        return Snapshot(
            request=RoutedRequest(
                num_tokens=job.request.num_tokens,
                turn=job.ticket.order,
                draw=job.draw,
                session=job.request.session or job.prefix.session,
                ttft_slack_s=late_at - time.monotonic(),
            ),
            view=one_group(view, job.weights),
            cached_tokens=cached_tokens,
            held_tokens=held_tokens,
            avoid=job.avoid,
        )

    def placed(self, job: RoutedJob, placement: Placement) -> None:
        """Count where an attempt's prompt is computed."""
        computed_by = placement.prefill or placement.decode
        self._metrics.expected_cached_tokens.inc(self._cached_tokens(job).get(computed_by, 0))
        if placement.prefill is not None:
            self._metrics.remote_prefills.inc()
        elif self._pool.any_prefill_alive:
            self._metrics.local_prefills.inc()

    def uncached_tokens(self, job: RoutedJob, worker: str) -> int:
        """Tokens that it is expected to compute."""
        return max(1, job.request.num_tokens - self._cached_tokens(job).get(worker, 0))

    def _cached_tokens(self, job: RoutedJob) -> Mapping[str, int]:
        """Leading prompt tokens whose KV each worker holds."""
        prefix = job.prefix
        if job.request.prompt_logprobs is not None:  # needs logits of every prompt token, so no cache is read
            return {}
        if prefix.version != self.index.version:
            prefix.version = self.index.version
            prefix.cached_tokens = dict(self._match(job))
        return prefix.cached_tokens

    def _match(self, job: RoutedJob) -> Iterator[tuple[str, int]]:
        alike: dict[_Hashing, list[WorkerLink]] = {}
        for link in self._pool:
            if link.info is not None and link.info.prefix_model_id:
                alike.setdefault(_Hashing.of(link.info), []).append(link)
        for hashing, links in alike.items():
            prompt = job.prefix.prompts.get(hashing)
            if prompt is None:
                prompt = job.prefix.prompts[hashing] = _prompt_keys(job, hashing)
            found = prompt.match(self.index)
            job.prefix.session = prompt.session
            for link in links:
                if (num_blocks := found.get(link.address, 0)) > 0:
                    yield link.address, num_blocks * hashing.block_size


def _prompt_keys(job: RoutedJob, hashing: _Hashing) -> PromptKeys:
    request = job.request
    namespace = prefix_namespace(model_id=hashing.model_id, kv_dtype=hashing.kv_dtype, tenant=request.tenant)
    return PromptKeys(request.prompt_token_ids, namespace, hashing.block_size)
