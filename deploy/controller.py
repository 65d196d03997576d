"""The cluster's desired state: starts every process, keeps it running, tells routers who serves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import grpc.aio
import ray
from ray.exceptions import RayActorError

from ..client.results import RouterStatus, status_from_proto
from ..core.config import WORKER_ROLES, ClusterConfig, Role
from ..core.errors import SplitserveError
from ..proto import inference_pb2, inference_pb2_grpc
from ..proto.rpc import CHANNEL_OPTIONS
from .admin_access import AdminAccess
from .placement import create_actor, find_group, place
from .process import Endpoint, Exit, StartFailure
from .roles import role_command, role_environment, role_needs

logger = logging.getLogger(__name__)

_RPC_TIMEOUT_S = 2.0
_STATUS_PERIOD_S = 0.5
_STARTING_PERIOD_S = 0.1
_MAX_BACKOFF_S = 30.0
_EXIT_S = 3.0  # for a process to end once it has drained


class Phase(Enum):
    """What the controller is doing with a process."""

    PLACING = "placing"
    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting to restart"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One process of the cluster as the controller sees it."""

    name: str
    role: Role
    phase: Phase = Phase.PLACING
    endpoint: Endpoint | None = None
    num_restarts: int = 0
    reason: str = ""  # why it is not ready


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """A snapshot. `routers` holds the answer of each router that answers."""

    members: tuple[Member, ...]
    routers: tuple[RouterStatus, ...]
    ready: bool

    @property
    def router_addresses(self) -> tuple[str, ...]:
        return tuple(m.endpoint.address for m in self.members if m.role == "router" and m.endpoint)

    @property
    def http_addresses(self) -> tuple[str, ...]:
        """Of the routers that serve HTTP."""
        return tuple(m.endpoint.http_address for m in self.members if m.endpoint and m.endpoint.http_address)


class MemberFailed(SplitserveError):
    """A process did not come up; `log_tail` is the end of what it wrote, if it wrote anything."""

    code = "internal"

    def __init__(self, name: str, failure: StartFailure) -> None:
        super().__init__(f"{name} did not start: {failure.message}")
        self.log_path = failure.log_path
        self.log_tail = failure.log_tail


class Command(Protocol):
    """Makes the command line of one process; see roles.role_command."""

    def __call__(
        self,
        config: ClusterConfig,
        role: Role,
        *,
        name: str,
        host: str,
        port: int,
        num_threads: int,
        http_port: int,
    ) -> Sequence[str]: ...


class Controller:
    """Owns the processes of one cluster; needs an initialised Ray.

    `run` returns after `stop`, or raises when the cluster cannot start or serve any more; either way it leaves no
    process, actor or placement group behind.
    """

    def __init__(self, config: ClusterConfig, log_dir: Path, *, command: Command = role_command) -> None:
        self.ready = asyncio.Event()  # every process serves and every router has a session with every worker
        self.stopping = asyncio.Event()
        self._config = config
        self._log_dir = log_dir
        self._command = command
        self._access = AdminAccess()
        roles: list[tuple[Role, int]] = [(role, config.replicas(role)) for role in WORKER_ROLES]
        roles.append(("router", config.router.replicas))
        self._members = {
            name: Member(name=name, role=role)
            for role, count in roles
            for name in (f"{role}-{index}" for index in range(count))
        }
        self._actors: dict[str, Any] = {}
        self._views: dict[str, RouterStatus] = {}
        self._routing_changed = asyncio.Event()
        self._hurry = asyncio.Event()

    def view(self) -> ClusterView:
        return ClusterView(
            members=tuple(self._members.values()), routers=tuple(self._views.values()), ready=self.ready.is_set()
        )

    def stop(self) -> None:
        """Ask `run` to end; a second call cuts the draining short."""
        if self.stopping.is_set():
            self._hurry.set()
        self.stopping.set()

    async def run(self) -> None:
        """Raises: MemberFailed, ConfigError, Unavailable: see the class."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._keep(name)) for name in self._members]
                tasks.append(group.create_task(self._tell_routers()))
                await self.stopping.wait()
                for task in tasks:
                    task.cancel()
        except BaseExceptionGroup as failed:
            raise first_error(failed) from failed
        finally:
            await self._stop_all()

    # -- one process --

    async def _keep(self, name: str) -> None:
        """Start one process and start it again whenever it dies, within the bounds of `restart`."""
        bounds = self._config.restart
        restarts: deque[float] = deque()
        ports = self._ports(name)
        while True:
            started = await self._start(name, *ports)
            if isinstance(started, Endpoint):
                if self._members[name].role == "router":  # its clients find it again
                    ports = _port(started.address), _port(started.http_address) if started.http_address else -1
                reason = str(await self._death(name))
            else:
                reason = started.message
                if not self.ready.is_set():
                    raise MemberFailed(name, started)
            now = time.monotonic()
            restarts.append(now)
            while now - restarts[0] > bounds.window_s:
                restarts.popleft()
            if len(restarts) > bounds.max_restarts:
                logger.error("%s %s; it stays down after %d restarts", name, reason, bounds.max_restarts)
                self._update(name, phase=Phase.FAILED, endpoint=None, reason=reason)
                if self._members[name].role == "router":
                    raise SplitserveError(f"{name} {reason} and stays down after {bounds.max_restarts} restarts")
                return
            backoff_s = min(_MAX_BACKOFF_S, bounds.backoff_s * 2 ** (len(restarts) - 2)) if len(restarts) > 1 else 0.0
            logger.warning("%s %s; restarting in %.1f s", name, reason, backoff_s)
            num_restarts = self._members[name].num_restarts + 1
            self._update(name, phase=Phase.WAITING, endpoint=None, num_restarts=num_restarts, reason=reason)
            await asyncio.sleep(backoff_s)

    async def _start(self, name: str, port: int, http_port: int) -> Endpoint | StartFailure:
        config, role = self._config, self._members[name].role
        self._update(name, phase=Phase.PLACING)
        needs = role_needs(config, role)
        log_path = self._log_dir / f"{name}.log"
        try:
            group = await place(name, needs, timeout_s=config.startup_timeout_s)
            self._update(name, phase=Phase.STARTING)
            # The first handle is kept: the actor ends with it, whatever handles were made since.
            if name not in self._actors:
                self._actors[name] = create_actor(name, group, needs, log_path=log_path)
            command = self._command(
                config,
                role,
                name=name,
                host=self._host(role),
                port=port,
                num_threads=needs.num_threads,
                http_port=http_port,
            )
            environment = {**role_environment(needs.num_threads), **self._access.environment}
            started: Endpoint | StartFailure = await self._actors[name].start.remote(
                command, environment, config.startup_timeout_s
            )
        except SplitserveError as error:  # it cannot be placed
            return StartFailure(code=error.code, message=error.message)
        except RayActorError as error:
            self._actors.pop(name, None)
            return StartFailure(code="worker_lost", message=f"its actor died: {error}")
        if isinstance(started, Endpoint):
            logger.info("%s serves at %s, pid %d", name, started.address, started.pid)
            self._update(name, phase=Phase.READY, endpoint=started, reason="")
        return started

    async def _death(self, name: str) -> Exit | str:
        """How the process ended; its actor or its node may have gone with it."""
        try:
            ended: Exit = await self._actors[name].wait.remote()
            return ended
        except RayActorError:
            del self._actors[name]
            return "lost its actor"

    def _update(self, name: str, **changes: Any) -> None:
        before = self._members[name]
        self._members[name] = after = replace(before, **changes)
        if before.endpoint != after.endpoint:
            self._routing_changed.set()

    def _host(self, role: Role) -> str:
        if role == "router":
            return self._config.router.host
        return self._config.worker_host or ("{node_ip}" if self._config.ray.address else "127.0.0.1")

    def _ports(self, name: str) -> tuple[int, int]:
        """For gRPC and HTTP: routers have consecutive ports from the configured ones, workers listen where there is
        room.
        """
        router = self._config.router
        role, _, index = name.rpartition("-")
        if role != "router":
            return 0, -1
        return router.port + int(index) if router.port else 0, router.http_port_of(int(index))

    # -- routers --

    async def _tell_routers(self) -> None:
        """Give every router the list of workers whenever it changes, and ask each how it fares."""
        channels: dict[str, grpc.aio.Channel] = {}
        metadata = self._access.metadata
        told: dict[str, tuple[str, inference_pb2.SetWorkersRequest]] = {}  # router -> (its boot id, the list)
        try:
            while True:
                self._routing_changed.clear()
                workers = self._workers()
                for member in self._members.values():
                    if member.role != "router":
                        continue
                    if member.endpoint is None:
                        self._views.pop(member.name, None)
                        told.pop(member.name, None)
                        continue
                    address = member.endpoint.address
                    if address not in channels:
                        channels[address] = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
                    stub = inference_pb2_grpc.RouterAdminStub(channels[address])
                    try:
                        if told.get(member.name) != (member.endpoint.boot_id, workers):
                            await stub.SetWorkers(workers, timeout=_RPC_TIMEOUT_S, metadata=metadata)
                            told[member.name] = (member.endpoint.boot_id, workers)
                        request = inference_pb2.GetRouterStatusRequest()
                        answer = await stub.GetRouterStatus(request, timeout=_RPC_TIMEOUT_S, metadata=metadata)
                        self._views[member.name] = status_from_proto(answer)
                    except grpc.aio.AioRpcError as error:
                        logger.warning("%s does not answer: %s", member.name, error.details())
                        self._views.pop(member.name, None)
                self._judge_ready()
                await self._next_round()
        finally:
            await asyncio.gather(*(channel.close() for channel in channels.values()))

    def _workers(self) -> inference_pb2.SetWorkersRequest:
        ready = [m for m in self._members.values() if m.endpoint is not None]
        return inference_pb2.SetWorkersRequest(
            prefill_addresses=[m.endpoint.address for m in ready if m.endpoint and m.role == "prefill"],
            decode_addresses=[m.endpoint.address for m in ready if m.endpoint and m.role in ("decode", "colocated")],
        )

    def _judge_ready(self) -> None:
        """Raises: SplitserveError: at start, a router refuses a worker."""
        if self.ready.is_set() or any(m.endpoint is None for m in self._members.values()):
            return
        num_workers = sum(m.role != "router" for m in self._members.values())
        views = list(self._views.values())
        for worker in (worker for view in views for worker in view.workers):
            if worker.state == "refused":
                raise SplitserveError(f"the router refuses the worker at {worker.address}: {worker.reason}")
        ready_counts = [sum(worker.state == "ready" for worker in view.workers) for view in views]
        if ready_counts == [num_workers] * self._config.router.replicas:
            self.ready.set()

    async def _next_round(self) -> None:
        """Wait for a change of the list of workers, or for the next status."""
        try:
            async with asyncio.timeout(_STATUS_PERIOD_S if self.ready.is_set() else _STARTING_PERIOD_S):
                await self._routing_changed.wait()
        except TimeoutError:
            pass

    # -- the end --

    async def _stop_all(self) -> None:
        """Routers first, so that no request meets a worker that is going; then workers, all at once."""
        self.stopping.set()
        for is_router in (True, False):
            names = [name for name in self._actors if (self._members[name].role == "router") == is_router]
            await asyncio.gather(*(self._stop_one(name) for name in names))
        for name in self._members:
            group = find_group(name)
            if group is not None:
                ray.util.remove_placement_group(group)

    async def _stop_one(self, name: str) -> None:
        actor = self._actors[name]
        grace_s = self._config.drain_timeout_s + _EXIT_S
        drained = asyncio.wrap_future(actor.stop.remote(grace_s).future())
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({drained, hurry}, timeout=grace_s + _EXIT_S, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not drained.cancel() and drained.exception() is not None:
            logger.warning("%s lost its actor while it was stopped", name)
        ray.kill(actor)  # its process, if it still lives, is killed with it
        self._update(name, phase=Phase.STOPPED, endpoint=None)


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What went wrong first; a typed error if there is one."""
    typed, rest = group.split(SplitserveError)
    found: BaseException = typed or rest or group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])
