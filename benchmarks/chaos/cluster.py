"""The processes that faults strike: workers behind links of ours, routers that clients reach directly."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio

from ...core.config import ClusterConfig, Role
from ...core.errors import SplitserveError
from ...deploy.process import Endpoint, RoleProcess, StartFailure
from ...deploy.roles import role_command, role_environment
from ...proto import inference_pb2, worker_pb2
from ...proto.inference_pb2_grpc import RouterAdminStub
from ...proto.worker_pb2_grpc import WorkerAdminStub
from .link import Link
from .plan import DECODES, PREFILLS, ROUTERS

DRAIN_S = 20.0
_ADMIN_TIMEOUT_S = 10.0


@dataclass(slots=True, kw_only=True)
class Member:
    """One process of the cluster, over all its incarnations."""

    name: str
    role: Role
    process: RoleProcess
    endpoint: Endpoint | None = None
    sessions: dict[str, Link] = field(default_factory=dict)  # of a worker: how each router reaches it
    kv: Link | None = None  # of a prefill worker: how decode workers reach it

    def links(self) -> list[Link]:
        return [*self.sessions.values(), *([self.kv] if self.kv is not None else [])]


class ChaosCluster:
    """Two routers, two prefill and two decode workers. One decode worker fetches over gRPC, the other as it likes."""

    def __init__(self, config: ClusterConfig, log_dir: Path, seed: int) -> None:
        self._config = config
        self._rng = random.Random(seed)
        self._log_dir = log_dir
        self._links: list[Link] = []  # all that ever were
        self.members = {name: self._member(name) for name in (*PREFILLS, *DECODES, *ROUTERS)}

    def _member(self, name: str) -> Member:
        role: Role = "router" if name in ROUTERS else "prefill" if name in PREFILLS else "decode"
        return Member(name=name, role=role, process=RoleProcess(self._log_dir / f"{name}.log"))

    @property
    def router_addresses(self) -> list[str]:
        return [self.endpoint(name).address for name in ROUTERS]

    @property
    def num_corrupted(self) -> int:
        """Frames of KV that links changed so far."""
        return sum(link.num_changed for link in self._links)

    def endpoint(self, name: str) -> Endpoint:
        endpoint = self.members[name].endpoint
        assert endpoint is not None, f"{name} was never started"
        return endpoint

    async def start(self) -> None:
        """Workers, then routers. Raises: SplitserveError: one did not start."""
        for name in (*PREFILLS, *DECODES):
            await self._new_links(self.members[name])
        await asyncio.gather(*(self.launch(name) for name in (*PREFILLS, *DECODES)))
        await asyncio.gather(*(self.launch(name) for name in ROUTERS))

    async def stop(self) -> None:
        await asyncio.gather(*(member.process.stop(0.0) for member in self.members.values()))
        for member in self.members.values():
            for link in member.links():
                await link.close()

    async def launch(self, name: str, *, same_address: bool = True) -> None:
        """Start a process where there is none; other addresses are told to the routers by `tell_routers`."""
        member = self.members[name]
        if not same_address:
            for link in member.links():
                await link.close()
            await self._new_links(member)
        endpoint = await member.process.start(
            self._command(member), role_environment(1), self._config.startup_timeout_s
        )
        if isinstance(endpoint, StartFailure):
            raise SplitserveError(f"{name} did not start: {endpoint.message}\n{endpoint.log_tail}")
        member.endpoint = endpoint
        for link in member.links():
            link.target = endpoint.address

    def signal(self, name: str, number: signal.Signals) -> None:
        os.kill(self.endpoint(name).pid, number)

    async def kill(self, name: str) -> None:
        self.signal(name, signal.SIGKILL)
        await self.members[name].process.wait()

    async def drain(self, name: str) -> None:
        """As an operator would: Drain, then SIGTERM, and the end of the process."""
        async with grpc.aio.insecure_channel(self.endpoint(name).address) as channel:
            await WorkerAdminStub(channel).Drain(worker_pb2.DrainRequest(timeout_s=DRAIN_S), timeout=DRAIN_S + 10)
        await self.members[name].process.stop(DRAIN_S)

    async def tell_routers(self) -> None:
        """Tell every router that answers where the workers are now; one that hangs is told after it was woken."""
        await asyncio.gather(*(self._tell(name) for name in ROUTERS))

    async def _tell(self, router: str) -> None:
        request = inference_pb2.SetWorkersRequest(
            prefill_addresses=self._seen_by(router, PREFILLS), decode_addresses=self._seen_by(router, DECODES)
        )
        try:
            async with grpc.aio.insecure_channel(self.endpoint(router).address) as channel:
                await RouterAdminStub(channel).SetWorkers(request, timeout=_ADMIN_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            pass  # dead, and started with the list as it is then, or hanging, and told again when it is woken

    async def worker_status(self, name: str) -> worker_pb2.WorkerStatus:
        """Raises: grpc.aio.AioRpcError."""
        async with grpc.aio.insecure_channel(self.endpoint(name).address) as channel:
            request = worker_pb2.GetWorkerStatusRequest()
            return (await WorkerAdminStub(channel).GetWorkerStatus(request, timeout=_ADMIN_TIMEOUT_S)).status

    async def router_status(self, name: str) -> inference_pb2.GetRouterStatusResponse:
        """Raises: grpc.aio.AioRpcError."""
        async with grpc.aio.insecure_channel(self.endpoint(name).address) as channel:
            request = inference_pb2.GetRouterStatusRequest()
            return await RouterAdminStub(channel).GetRouterStatus(request, timeout=_ADMIN_TIMEOUT_S)

    def _seen_by(self, router: str, workers: Sequence[str]) -> list[str]:
        return [self.members[name].sessions[router].address for name in workers]

    async def _new_links(self, member: Member) -> None:
        member.sessions = {router: Link(self._rng) for router in ROUTERS}
        member.kv = Link(self._rng) if member.role == "prefill" else None
        self._links += member.links()
        for link in member.links():
            await link.start()

    def _command(self, member: Member) -> list[str]:
        config = self._config
        if member.role != "router":
            config = config.model_copy(update={"trace_dir": None})
        if member.name == DECODES[0]:
            config = config.model_copy(update={"transport": "grpc"})
        port = int(member.endpoint.address.rpartition(":")[2]) if member.endpoint and member.role == "router" else 0
        command = list(role_command(config, member.role, name=member.name, host="127.0.0.1", port=port, num_threads=1))
        if member.kv is not None:
            command += ["--kv-address", member.kv.address]
        if member.role == "router":
            for flag, workers in (("--prefill", PREFILLS), ("--decode", DECODES)):
                for address in self._seen_by(member.name, workers):
                    command += [flag, address]
        return command


@asynccontextmanager
async def chaos_cluster(config: ClusterConfig, log_dir: Path, seed: int) -> AsyncIterator[ChaosCluster]:
    """Everything up; on leaving, everything is killed."""
    async with AsyncExitStack() as stack:
        cluster = ChaosCluster(config, log_dir, seed)
        stack.push_async_callback(cluster.stop)
        await cluster.start()
        yield cluster
