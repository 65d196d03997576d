"""One chaos run: load and faults side by side, then silence, in which every block must come back."""

from __future__ import annotations

import asyncio
import logging
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from ...client import AsyncClient, GenerationResult, RetryPolicy
from ...core.config import ClusterConfig, load_config
from ...proto import worker_pb2
from .cluster import ChaosCluster, chaos_cluster
from .followed import Followed
from .plan import DECODES, PREFILLS, ROUTERS, ChaosPlan
from .strike import Striker, Struck
from .verdict import Verdict, judge

logger = logging.getLogger(__name__)

LEASE_S = 10.0
MAX_IN_FLIGHT = 32
_SETTLE_S = LEASE_S + 30.0  # leases run out and routers hear of clients that are gone
_POLL_S = 0.2
_ATTEMPTS = 10  # more than faults that one request can meet, so that every failure is ours


def chaos_config(model: Path, traces: Path) -> ClusterConfig:
    """Small steps and a small pool, so that prefill takes a while and blocks are scarce."""
    return load_config(
        None,
        {
            "model": str(model),
            "trace_dir": str(traces),
            "lease_s": LEASE_S,
            "drain_timeout_s": 20.0,
            "engine.num_kv_blocks": 512,
            "engine.max_step_tokens": 64,
            "engine.dtype": "float32",
            "engine.self_check": False,
            "router.max_attempts": _ATTEMPTS,
            "router.max_worker_deaths": _ATTEMPTS,  # these workers' deaths are nobody's fault
            "router.no_worker_wait_s": 30.0,
        },
    )


async def run_chaos(
    plan: ChaosPlan,
    expected: list[GenerationResult],
    *,
    num_requests: int,
    config: ClusterConfig,
    log_dir: Path,
    tell: Callable[[str], object] = lambda _: None,
) -> tuple[Verdict, list[Struck], list[Followed]]:
    """Send at least `num_requests`, and go on until every fault of the plan has struck and is healed.

    Raises: SplitserveError, TimeoutError: the cluster did not come up, or not back.
    """
    tell("starting 2 routers, 2 prefill and 2 decode workers")
    async with chaos_cluster(config, log_dir, plan.seed) as cluster:
        retry = RetryPolicy(max_attempts=_ATTEMPTS, max_backoff_s=1.0)
        async with AsyncClient(cluster.router_addresses, retry=retry) as client:
            await client.generate([5], max_tokens=1)  # returns once a router has sessions with both pools
            began_s = time.monotonic()
            striker = Striker(cluster)
            striking = asyncio.create_task(striker.run(plan.faults, began_s))
            try:
                followed = await _load(plan, expected, num_requests, client, striking, began_s, tell, striker.struck)
            finally:
                striking.cancel()
                await asyncio.gather(striking, return_exceptions=True)
            seconds = time.monotonic() - began_s
        tell("waiting until nothing is held any more")
        orphaned, live = await _settle(cluster)
    verdict = judge(
        followed, orphaned, live, faults=len(striker.struck), seconds=seconds, corrupted=cluster.num_corrupted
    )
    return verdict, striker.struck, followed


async def _load(
    plan: ChaosPlan,
    expected: list[GenerationResult],
    num_requests: int,
    client: AsyncClient,
    striking: asyncio.Task[None],
    began_s: float,
    tell: Callable[[str], object],
    struck: list[Struck],
) -> list[Followed]:
    followed: list[Followed] = []
    room = asyncio.Semaphore(MAX_IN_FLIGHT)

    async def one(request: Followed) -> None:
        try:
            await request.run(client, plan.cases[request.planned.case])
        finally:
            room.release()
            ended = sum(request.outcome != "running" for request in followed)
            tell(f"{ended} of {len(followed)} requests ended, {len(struck)} of {len(plan.faults)} faults struck")

    async with asyncio.TaskGroup() as group:
        for planned in plan.requests():
            if planned.number >= num_requests and striking.done():
                break
            await asyncio.sleep(max(0.0, began_s + planned.at_s - time.monotonic()))
            await room.acquire()
            followed.append(Followed(planned=planned, expected=expected[planned.case]))
            group.create_task(one(followed[-1]))
    striking.result()
    return followed


async def _settle(cluster: ChaosCluster) -> tuple[dict[str, int], dict[str, int]]:
    """Blocks of each worker that nobody gave back, and requests of each router without an end."""
    workers, routers = (*PREFILLS, *DECODES), ROUTERS
    held: dict[str, int] = {}
    live: dict[str, int] = {}
    deadline_s = time.monotonic() + _SETTLE_S
    while time.monotonic() < deadline_s:
        statuses = await asyncio.gather(*(cluster.worker_status(name) for name in workers))
        views = await asyncio.gather(*(cluster.router_status(name) for name in routers))
        held = {name: _held(status) for name, status in zip(workers, statuses, strict=True)}
        live = {name: view.num_live + view.num_queued for name, view in zip(routers, views, strict=True)}
        if not any(held.values()) and not any(live.values()):
            break
        await asyncio.sleep(_POLL_S)
    counted = await asyncio.gather(*(_orphans(cluster.endpoint(name).metrics_address) for name in workers))
    return {name: max(held[name], count) for name, count in zip(workers, counted, strict=True)}, live


def _held(status: worker_pb2.WorkerStatus) -> int:
    blocks = status.num_blocks - status.num_free_blocks - status.num_cached_blocks
    return blocks or status.num_running + status.num_waiting + status.num_held


async def _orphans(metrics_address: str) -> int:
    """The worker's own exact count."""

    def read() -> str:
        with urllib.request.urlopen(f"http://{metrics_address}/metrics", timeout=10) as response:
            return str(response.read(), "utf-8")

    for family in text_string_to_metric_families(await asyncio.to_thread(read)):
        if family.name == "splitserve_kv_blocks_orphaned":
            return int(sum(sample.value for sample in family.samples))
    raise LookupError(f"{metrics_address} does not tell splitserve_kv_blocks_orphaned")
