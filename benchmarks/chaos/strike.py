"""Faults, one after the other as planned: struck, healed, and the cluster made whole again."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc.aio

from .cluster import ChaosCluster
from .link import Link
from .plan import POOLS, ROUTERS, Fault, FaultKind

logger = logging.getLogger(__name__)

_DUTY_S = (0.099, 0.001)  # slow: stopped, running
_POLL_S = 0.1
_WORK_S = 3.0
WHOLE_S = 120.0  # a process that was started is in use again within this, or the run is given up


@dataclass(slots=True, kw_only=True)
class Struck:
    """A fault that happened; monotonic times."""

    fault: Fault
    struck_s: float
    healed_s: float | None = None  # the cause is gone
    whole_s: float | None = None  # every router uses the target again


class Striker:
    """Runs the faults of a plan; those of different pools overlap."""

    def __init__(self, cluster: ChaosCluster) -> None:
        self._cluster = cluster
        self._pools = {pool: asyncio.Lock() for pool in POOLS}
        self.struck: list[Struck] = []

    async def run(self, faults: Sequence[Fault], began_s: float) -> None:
        """Returns when every fault is healed. Raises: SplitserveError, TimeoutError: the cluster does not come back."""
        async with asyncio.TaskGroup() as group:
            for fault in faults:
                await asyncio.sleep(max(0.0, began_s + fault.at_s - time.monotonic()))
                lock = self._pools[fault.pool]
                await lock.acquire()
                group.create_task(self._strike(fault, lock))

    async def _strike(self, fault: Fault, lock: asyncio.Lock) -> None:
        try:
            await self._has_work(fault.target)
            row = Struck(fault=fault, struck_s=time.monotonic())
            self.struck.append(row)
            logger.info("%s: %s", fault.label, fault)
            await self._do(fault, row)
            row.healed_s = row.healed_s or time.monotonic()
            async with asyncio.timeout(WHOLE_S):
                await self._whole(fault.target)
            row.whole_s = time.monotonic()
        finally:
            lock.release()

    async def _has_work(self, name: str) -> None:
        """Wait for a moment in which the fault hits somebody; none may come, so not for ever."""
        until_s = time.monotonic() + _WORK_S
        while name not in ROUTERS and time.monotonic() < until_s:
            try:
                status = await self._cluster.worker_status(name)
            except grpc.aio.AioRpcError:
                continue  # too busy to answer: it has work
            if status.num_running + status.num_waiting + status.num_held:
                return

    async def _do(self, fault: Fault, row: Struck) -> None:
        cluster, name = self._cluster, fault.target
        if fault.link:
            links = self._links(fault)
            for link in links:
                link.inject(fault.kind)
            await asyncio.sleep(fault.duration_s)
            for link in links:
                link.heal()
            return
        match fault.kind:
            case FaultKind.KILL:
                await cluster.kill(name)
                await asyncio.sleep(fault.duration_s)
            case FaultKind.DRAIN:
                await cluster.drain(name)
                await asyncio.sleep(fault.duration_s)
            case FaultKind.HANG:
                cluster.signal(name, signal.SIGSTOP)
                await asyncio.sleep(fault.duration_s)
                cluster.signal(name, signal.SIGCONT)
            case FaultKind.SLOW:
                until_s = time.monotonic() + fault.duration_s
                while time.monotonic() < until_s:
                    for number, seconds in zip((signal.SIGSTOP, signal.SIGCONT), _DUTY_S, strict=True):
                        cluster.signal(name, number)
                        await asyncio.sleep(seconds)
            case _:
                raise AssertionError(f"{fault.kind} is a fault of links")
        if fault.kind in (FaultKind.KILL, FaultKind.DRAIN):
            row.healed_s = time.monotonic()
            await cluster.launch(name, same_address=fault.same_address)
        await cluster.tell_routers()

    def _links(self, fault: Fault) -> list[Link]:
        member = self._cluster.members[fault.target]
        if fault.link == "kv":
            assert member.kv is not None, f"{fault.target} has no KV to fetch"
            return [member.kv]
        return [member.sessions[router] for router in fault.routers]

    async def _whole(self, name: str) -> None:
        """Wait until every router that answers has both workers of each pool; the state has no event to wait for."""
        routers = [name] if name in ROUTERS else list(ROUTERS)
        while routers:
            for router in list(routers):
                try:
                    status = await self._cluster.router_status(router)
                except grpc.aio.AioRpcError:
                    continue  # itself struck: its own fault waits for it
                if self._is_used(name, router, {view.address for view in status.workers if view.state == "ready"}):
                    routers.remove(router)
            await asyncio.sleep(_POLL_S)

    def _is_used(self, name: str, router: str, ready: set[str]) -> bool:
        members = self._cluster.members
        if name in ROUTERS:  # it is whole when it sees a worker of each pool
            return all(
                any(members[w].sessions[router].address in ready for w in POOLS[p]) for p in ("prefill", "decode")
            )
        return members[name].sessions[router].address in ready
