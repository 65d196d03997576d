"""Keeps one process of the cluster running: places it, starts it, again when it dies, and drains it at the end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from ..core.address import is_loopback
from ..core.config import ClusterConfig, Role, WorkerRole
from ..core.errors import ConfigError, SplitserveError, Unavailable
from .launch import Command, Launch, make_launch
from .members import Member, MemberFailed, Phase
from .options import tls_of
from .placement import create_actor, nodes_with, place, remove_group
from .process import Endpoint, StartFailure
from .roles import Needs
from .worker_admin import drain_worker, switch_worker

logger = logging.getLogger(__name__)

_MAX_BACKOFF_S = 30.0
_RAY_AWAY_S = 1.0  # between two tries, where there is no room or Ray's head does not answer
_EXIT_S = 3.0  # for a process to end once it has drained


class _Order(Enum):
    """What the controller wants of a running process."""

    RENEW = "start it again with new settings"
    REPLACE = "kill it and start it again"
    RETIRE = "drain and remove it"
    SWITCH = "drain it and give it another role"


class Keeper:
    """One process. `run` it as a task; it ends once the process is retired, or may not be started any more.

    Args:
        environment: what the process gets besides what its configuration says; another one is no reason to restart it.
        changed: called whenever `member` has changed.
        prefer: of a name and the ids of nodes that could hold it, those that it should rather go to.
        must_start: whether a failure now is the cluster's failure.
        can_lose: whether the cluster serves without the router of this name.
    """

    def __init__(
        self,
        name: str,
        role: Role,
        config: ClusterConfig,
        log_dir: Path,
        *,
        command: Command,
        environment: Mapping[str, str],
        changed: Callable[[Member, Member], None],
        prefer: Callable[[str, Sequence[str]], Sequence[str]],
        must_start: Callable[[], bool],
        can_lose: Callable[[str], bool],
    ) -> None:
        self.member = Member(name=name, role=role)
        self.config = config
        self.retiring = False
        self.hurry = asyncio.Event()  # stop without draining any longer
        self._log_path = log_dir / f"{name}.log"
        self._command = command
        self._environment = environment
        self._changed = changed
        self._prefer = prefer
        self._must_start = must_start
        self._can_lose = can_lose
        self._order: _Order | None = None
        self._ordered = asyncio.Event()
        self._reason = ""
        self._actor: Any = None
        self._lost_node = ""
        self._on_cpu = False
        self._ports: tuple[int, int] | None = None  # of a router, which its clients find again
        self._started_with = ""  # digest of the launch that was tried last
        self._served_with = ""  # and of the last one that served
        self._switched_with = ""  # and of one that may take its place without a start
        self._restarts: deque[float] = deque()

    @property
    def name(self) -> str:
        return self.member.name

    @property
    def outdated(self) -> bool:
        """Whether the process runs with other settings than it should, or failed with others."""
        endpoint = self.member.endpoint
        if self.member.phase is Phase.FAILED:
            return self._started_with != self.wanted
        if endpoint is None or self.member.phase is Phase.SWITCHING:
            return False
        return endpoint.launch != self.wanted

    @property
    def wanted(self) -> str:
        """Digest of the settings that it should have."""
        return self._launch(fixed_ports=False).digest

    @property
    def ordered(self) -> bool:
        """Whether something else is to become of it soon."""
        return self.retiring or self._ordered.is_set()

    def retire(self) -> None:
        """Drain and remove it; `run` ends with that."""
        self.retiring = True
        self._give(_Order.RETIRE)

    def renew(self) -> None:
        """Drain it and start it with the settings of `config`."""
        self._give(_Order.RENEW)

    def switch(self, role: WorkerRole) -> None:
        """Drain it and give it another role without loading its model again; it belongs to its new pool at once.

        One that is outdated is started anew in its new role: the call that switches it changes no settings.
        """
        was_outdated = self.outdated
        self._update(role=role, phase=Phase.SWITCHING)
        self._switched_with = "" if was_outdated else self.wanted
        self._give(_Order.SWITCH)

    def replace(self, reason: str) -> None:
        """Kill it, since it does not work, and start it again."""
        self._reason = reason
        self._give(_Order.REPLACE)

    def _give(self, order: _Order) -> None:
        if self._order is not _Order.RETIRE:
            self._order = order
        self._ordered.set()

    async def run(self) -> None:
        """Raises: MemberFailed: it does not start, and the cluster has not started yet either."""
        while True:
            life = asyncio.create_task(self._live())
            ordered = asyncio.create_task(self._ordered.wait())
            try:
                await asyncio.wait({life, ordered}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                ordered.cancel()
                if not life.done():
                    life.cancel()
                    await asyncio.wait({life})
            order, self._order = self._order, None
            self._ordered.clear()
            if order is _Order.RETIRE:
                await self.remove(drain=True)
                return
            if order is _Order.RENEW or (order is _Order.SWITCH and not await self._take_role()):
                await self._prepare_renewal()
                continue
            if order is _Order.SWITCH:
                continue
            if order is _Order.REPLACE:
                await self._stop_process(0.0)
                reason = self._reason
                if self.member.endpoint is not None:
                    self._lost_node = self.member.endpoint.node
                await self._discard_actor()
                await asyncio.to_thread(remove_group, self.name)
            else:
                reason = life.result()
            if not await self._may_restart(reason):
                return

    async def remove(self, *, drain: bool) -> None:
        """End the process and give back what it had."""
        if drain:
            await self._drain()
        await self._stop_process(self.config.drain_timeout_s + _EXIT_S)
        await self._discard_actor()
        await asyncio.to_thread(remove_group, self.name)
        self._update(phase=Phase.STOPPED, endpoint=None)

    # -- its life --

    async def _live(self) -> str:
        """Start it and wait for its end; returns why it ended."""
        while True:
            try:
                started = await self._start()
            except RayActorError as error:
                await self._lose_actor()
                return f"its actor died: {error}"
            except RayError as error:  # the head is away; nothing is known to be wrong with the process
                self._update(reason=f"Ray does not answer: {error}")
                await asyncio.sleep(_RAY_AWAY_S)
                continue
            if isinstance(started, StartFailure):
                if self._must_start():
                    raise MemberFailed.of(self.name, started)
                return started.message
            if isinstance(started, Endpoint):
                break
        if self.member.role == "router":
            self._ports = _port(started.address), _port(started.http_address) if started.http_address else -1
        try:
            return str(await self._actor.wait.remote())
        except RayActorError:
            await self._lose_actor()
            return "lost its actor"

    async def _start(self) -> Endpoint | StartFailure | None:
        """None: it has no place yet."""
        if self._actor is None:
            self._update(phase=Phase.PLACING, endpoint=None)
        launch = await self._place()
        if launch is None:
            return None
        self._update(phase=Phase.STARTING, reason="")
        self._started_with = self.wanted
        started: Endpoint | StartFailure = await self._actor.start.remote(
            launch.command,
            {**launch.environment, **self._environment},
            self.config.startup_timeout_s,
            self._started_with,
        )
        if isinstance(started, Endpoint):
            logger.info("%s serves at %s, pid %d", self.name, started.address, started.pid)
            self._lost_node = ""
            self._served_with = started.launch
            self._update(phase=Phase.READY, endpoint=started, reason="")
        return started

    async def _place(self) -> Launch | None:
        """Raises: ConfigError, Unavailable: at the start of the cluster; later it waits for room."""
        if self._actor is not None:
            return self._launch()
        self._on_cpu = False
        try:
            try:
                await self._reserve()
            except ConfigError as error:
                role = self.member.role
                if role == "router" or not self.config.pool(role).cpu_fallback:
                    raise
                logger.warning("%s; %s runs on a CPU", error.message, self.name)
                self._on_cpu = True
                await self._reserve()
        except SplitserveError as error:
            if self._must_start():
                raise
            self._update(phase=Phase.UNPLACED, reason=error.message)
            await asyncio.sleep(_RAY_AWAY_S)
            return None
        return self._launch()

    async def _reserve(self) -> None:
        config, needs = self.config, self._launch().needs
        if self.member.role == "router" and config.ray.address and is_loopback(config.router.host):
            # Nobody else could reach it: it goes where the controller is.
            here = ray.get_runtime_context().get_node_id()
            needs = replace(needs, labels={**needs.labels, "ray.io/node-id": here})
        group = await place(
            self.name,
            needs,
            timeout_s=config.startup_timeout_s,
            nodes_timeout_s=config.placement.wait_for_nodes_s,
            waits=lambda reason: self._update(phase=Phase.UNPLACED, reason=reason),
            wish=await self._wish(needs),
        )
        self._actor = await asyncio.to_thread(create_actor, self.name, group, needs, log_path=self._log_path)

    async def _wish(self, needs: Needs) -> str:
        """Not the node where it was lost, which may be dead without Ray knowing; otherwise what `placement` says."""
        lost = self._lost_node
        if not lost and self.config.placement.pairs == "any":
            return ""
        nodes = [node for node in await asyncio.to_thread(nodes_with, needs) if node != lost]
        preferred = self._prefer(self.name, nodes)
        if preferred:
            return f"in({','.join(preferred)})"
        return f"!{lost}" if lost and nodes else ""

    def _launch(self, *, fixed_ports: bool = True) -> Launch:
        return make_launch(
            self.config,
            self.member.role,
            self.name,
            command=self._command,
            on_cpu=self._on_cpu,
            ports=self._ports if fixed_ports else None,
        )

    async def _may_restart(self, reason: str) -> bool:
        """Waits as long as it should before the next start. Raises: Unavailable: the last router does not."""
        bounds = self.config.restart
        now = time.monotonic()
        self._restarts.append(now)
        while now - self._restarts[0] > bounds.window_s:
            self._restarts.popleft()
        if len(self._restarts) > bounds.max_restarts:
            logger.error("%s %s; it stays down after %d restarts", self.name, reason, bounds.max_restarts)
            self._update(phase=Phase.FAILED, endpoint=None, reason=reason)
            # Other settings than it served with before: a corrected file may bring it back.
            has_changed = self._served_with not in ("", self._started_with)
            if self.member.role == "router" and not has_changed and not self._can_lose(self.name):
                raise Unavailable(f"{self.name} {reason} and stays down after {bounds.max_restarts} restarts")
            await self._ordered.wait()  # to be retired, or to be tried with other settings
            return not self.retiring or await self._removed()
        failures = len(self._restarts)
        backoff_s = min(_MAX_BACKOFF_S, bounds.backoff_s * 2 ** (failures - 2)) if failures > 1 else 0.0
        logger.warning("%s %s; restarting in %.1f s", self.name, reason, backoff_s)
        num_restarts = self.member.num_restarts + 1
        self._update(phase=Phase.WAITING, endpoint=None, num_restarts=num_restarts, reason=reason)
        try:
            async with asyncio.timeout(backoff_s):
                await self._ordered.wait()
        except TimeoutError:
            pass
        return True

    async def _removed(self) -> bool:
        await self.remove(drain=False)
        return False

    # -- its end --

    async def _prepare_renewal(self) -> None:
        """Stop the process; what it needs of its node may have changed too."""
        self._restarts.clear()
        await self._drain()
        await self._stop_process(self.config.drain_timeout_s + _EXIT_S)
        await self._discard_actor()
        await asyncio.to_thread(remove_group, self.name)
        self._update(phase=Phase.PLACING, endpoint=None, reason="")

    async def _take_role(self) -> bool:
        """Whether the process that runs has the member's role now; otherwise one must be started in it."""
        endpoint, role = self.member.endpoint, self.member.role
        if endpoint is None or self._actor is None or role == "router":
            return False
        taken = switch_worker(endpoint.address, role, self.config.drain_timeout_s, tls_of(self.config, "operator"))
        boot_id = await self._unless_hurried(taken)
        if boot_id is None or self._switched_with != self.wanted:
            return False
        try:
            await self._actor.took_role.remote(boot_id, self._switched_with)
        except RayError as error:
            logger.warning("%s lost its actor while it changed its role: %s", self.name, error)
            return False
        return True

    async def _drain(self) -> None:
        """Take no new work and wait for what runs; routers learn it from the worker itself and from us."""
        endpoint = self.member.serving
        self._update(phase=Phase.DRAINING)
        if endpoint is not None and self.member.role != "router" and not self.hurry.is_set():
            drained = drain_worker(endpoint.address, self.config.drain_timeout_s, tls_of(self.config, "operator"))
            await self._unless_hurried(drained)

    async def _stop_process(self, grace_s: float) -> None:
        """SIGTERM, which drains too; then SIGKILL."""
        if self._actor is None:
            return
        stopped = asyncio.wrap_future(self._actor.stop.remote(grace_s).future())
        await self._unless_hurried(_quietly(stopped, grace_s + _EXIT_S, self.name))

    async def _unless_hurried(self, work: Any) -> Any:
        """What the work returns; None if it was cut short."""
        task = asyncio.ensure_future(work)
        hurry = asyncio.create_task(self.hurry.wait())
        try:
            await asyncio.wait({task, hurry}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in (task, hurry):
                each.cancel()
        return task.result() if task.done() and not task.cancelled() else None

    async def _lose_actor(self) -> None:
        """It died, by itself or with its node: another place is looked for."""
        if self.member.endpoint is not None:
            self._lost_node = self.member.endpoint.node
        self._update(phase=Phase.WAITING, endpoint=None)
        await self._discard_actor()
        await asyncio.to_thread(remove_group, self.name)

    async def _discard_actor(self) -> None:
        """Its process, if it still lives, is killed with it."""
        actor, self._actor = self._actor, None
        if actor is not None:
            await asyncio.to_thread(ray.kill, actor)

    def _update(self, **changes: Any) -> None:
        before = self.member
        self.member = replace(before, **changes)
        if before != self.member:
            self._changed(before, self.member)


async def _quietly(stopped: asyncio.Future[None], timeout_s: float, name: str) -> None:
    """Wait for the end of a process, or for that of its actor."""
    try:
        async with asyncio.timeout(timeout_s):
            await stopped
    except TimeoutError:
        logger.warning("%s does not stop; it is killed", name)
    except RayError:
        logger.warning("%s lost its actor while it was stopped", name)


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])
