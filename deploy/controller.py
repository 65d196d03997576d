"""The cluster's desired state: starts every process, keeps it running, tells routers who serves, changes all of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..core.config import WORKER_ROLES, ClusterConfig, Role, WorkerRole
from ..core.errors import ConfigError, SplitserveError
from ..scheduling.scaling_signals import POOLS, ScalingDecision
from .admin_access import AdminAccess
from .changes import least_useful
from .keeper import Keeper
from .launch import Command
from .members import ClusterView, Member, Phase, PoolView, role_in
from .neighbours import preferred_nodes
from .options import tls_of
from .roles import role_command, with_threads
from .router_links import RouterLinks
from .scaler import Scaling, check_scaling
from .worker_watch import WorkerWatch

logger = logging.getLogger(__name__)

_ROLES: tuple[Role, ...] = (*WORKER_ROLES, "router")
_STATUS_PERIOD_S = 0.5
_STARTING_PERIOD_S = 0.1
_WATCH_PERIOD_S = 1.0


class Controller:
    """Owns the processes of one cluster; needs an initialised Ray.

    `run` returns after `stop`, or raises when the cluster cannot start or serve any more; either way it leaves no
    process, actor or placement group behind. Should its own process die, all of them stay, for the next incarnation to
    go on with.

    Args:
        adopt: processes that an earlier incarnation left, and the role of each.
        access: what that incarnation proved to routers who it was with.
    """

    def __init__(
        self,
        config: ClusterConfig,
        log_dir: Path,
        *,
        command: Command = role_command,
        adopt: Mapping[str, Role] | None = None,
        access: AdminAccess | None = None,
    ) -> None:
        self.ready = asyncio.Event()  # every process serves and every router has a session with every worker
        self.stopping = asyncio.Event()
        self.resized = asyncio.Event()  # by the controller itself; for whoever keeps what is wanted, who clears it
        self.config = with_threads(config)
        self._log_dir = log_dir
        self._command = command
        self._adopt = dict(adopt or {})
        if self._adopt:
            self.ready.set()
        self._keepers: dict[str, Keeper] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._access = access or AdminAccess()
        self._links = RouterLinks(self._access, tls_of(config, "operator"))
        self._watch = WorkerWatch(tls_of(config, "operator"))
        self._tasks: asyncio.TaskGroup | None = None
        self._routing_changed = asyncio.Event()  # routers must be told
        self._change = asyncio.Event()  # of any member; each change sets it and puts a new one in its place
        self._scaling: Scaling | None = None
        self._rolling: asyncio.Task[None] | None = None
        self._successor: Keeper | None = None  # of its pool's only worker, whose place it has not taken
        self._kept: dict[str, str] = {}  # process -> settings that it does not get: a roll-out ended before its turn
        self._is_settled = False

    def view(self) -> ClusterView:
        return ClusterView(
            members=tuple(keeper.member for keeper in self._keepers.values()),
            routers=self._links.views,
            ready=self.ready.is_set(),
            settled=self._is_settled,
            pools=tuple(self._pool_view(role) for role in WORKER_ROLES if self._wanted(role) or self._of(role)),
        )

    def stop(self) -> None:
        """Ask `run` to end; a second call cuts the draining short."""
        if self.stopping.is_set():
            for keeper in self._keepers.values():
                keeper.hurry.set()
        self.stopping.set()

    async def run(self) -> None:
        """Raises: MemberFailed, ConfigError, Unavailable: see the class."""
        try:
            async with asyncio.TaskGroup() as group:
                self._tasks = group
                if not self.ready.is_set():
                    self._check()
                for name, role in self._adopt.items():
                    self._add(role, name)
                self._reconcile()
                watching = [self._tell_routers(), self._watch_workers(), self._scale()]
                tasks = [group.create_task(work) for work in watching]
                self._roll_outdated()
                await self.stopping.wait()
                for task in (*tasks, *self._running.values(), *filter(None, [self._rolling])):
                    task.cancel()
        except BaseExceptionGroup as failed:
            raise first_error(failed) from failed
        finally:
            await self._stop_all()

    def _check(self) -> None:
        """Raises: ConfigError: what nobody but the controller needs is not there."""
        check_scaling(self.config)
        tls = tls_of(self.config, "operator")
        if tls is not None:
            tls.credentials()

    @property
    def roles(self) -> Mapping[str, Role]:
        """Of every process."""
        return {name: keeper.member.role for name, keeper in self._keepers.items()}

    # -- changes --

    def apply(self, config: ClusterConfig) -> None:
        """Carry out another configuration: start what is missing, drain what is too much, restart what is outdated."""
        self.config = self.complete(config)
        self._is_settled = False
        for keeper in self._keepers.values():
            keeper.config = self.config
        self._reconcile()
        self._roll_outdated()

    def complete(self, config: ClusterConfig) -> ClusterConfig:
        """The configuration with what it leaves to the running cluster: Ray, threads, and the size of scaled pools."""
        if config.ray.address == "auto":
            config = config.model_copy(update={"ray": self.config.ray})
        config = with_threads(config, self.config)
        sizes: dict[str, object] = {}
        for role in WORKER_ROLES:
            pool, running = config.pool(role), self.config.pool(role).replicas
            if running is not None and (pool.replicas is None or config.scaling.enabled):
                fewest, most = config.bounds(role)
                sizes[role] = pool.model_copy(update={"replicas": min(max(running, fewest), most)})
        return config.model_copy(update=sizes)

    def drain(self, name: str, *, restart: bool) -> None:
        """Drain one process by name, and start it again or take it out of its pool.

        Raises: ConfigError: there is none of this name, or its pool would be too small.
        """
        keeper = self._keepers.get(name)
        if keeper is None or keeper.retiring:
            raise ConfigError(f"there is no {name!r}; the cluster has {', '.join(sorted(self._keepers))}")
        self._is_settled = False
        if restart:
            keeper.renew()
            return
        role = keeper.member.role
        if role == "router":
            raise ConfigError(f"{name} is a router: drain it with a restart, or change router.replicas in the file")
        if keeper is self._successor:
            keeper.retire()
            return
        self.config = self.config.scaled({role: self.config.replicas(role) - 1})
        keeper.retire()
        self._roll_outdated()  # it may have been in the way

    def _wanted(self, role: Role) -> int:
        return self.config.router.replicas if role == "router" else self.config.replicas(role)

    def _of(self, role: Role) -> list[Keeper]:
        """The processes of a role that shall stay: those that are its pool."""
        return [k for k in self._staying() if k.member.role == role]

    def _staying(self) -> list[Keeper]:
        return [k for k in self._keepers.values() if not k.retiring and k is not self._successor]

    def _reconcile(self) -> None:
        """Send back who was switched and is missing, start what else is missing, retire what is too much."""
        self._send_home()
        num_running = {w.address: w.num_running for view in self._links.views for w in view.workers}
        for role in _ROLES:
            while len(self._of(role)) < self._wanted(role):
                self._add(role)
            excess = len(self._of(role)) - self._wanted(role)
            for member in least_useful([k.member for k in self._of(role)], excess, num_running):
                self._keepers[member.name].retire()

    def _send_home(self) -> None:
        """A worker that was given another role keeps its model on the way back: one is too much there, missing here."""
        for keeper in self._staying():
            member, home = keeper.member, role_in(keeper.name)
            if home is None or home == "router" or home == member.role or member.serving is None:
                continue
            if keeper.ordered or keeper.outdated:
                continue
            if len(self._of(member.role)) > self._wanted(member.role) and len(self._of(home)) < self._wanted(home):
                logger.info("%s becomes a %s worker again", member.name, home)
                keeper.switch(home)

    def _add(self, role: Role, name: str = "") -> Keeper:
        free = (f"{role}-{index}" for index in range(len(self._keepers) + 1) if f"{role}-{index}" not in self._keepers)
        keeper = Keeper(
            name or next(free),
            role,
            self.config,
            self._log_dir,
            command=self._command,
            environment=self._access.environment if role == "router" else {},
            changed=self._member_changed,
            prefer=self._preferred_nodes,
            must_start=lambda: not self.ready.is_set(),
            can_lose=self._has_other_router,
        )
        self._keepers[keeper.name] = keeper
        assert self._tasks is not None
        self._running[keeper.name] = self._tasks.create_task(self._keep(keeper))
        return keeper

    def _has_other_router(self, name: str) -> bool:
        return any(k.name != name and k.member.phase is not Phase.FAILED for k in self._of("router"))

    async def _keep(self, keeper: Keeper) -> None:
        await keeper.run()
        if keeper.retiring:
            del self._keepers[keeper.name], self._running[keeper.name]
            self._wake()

    def _roll_outdated(self) -> None:
        if self._rolling is None or self._rolling.done():
            assert self._tasks is not None
            if self._successor is not None:  # it failed
                self._successor.retire()
                self._successor = None
            self._rolling = self._tasks.create_task(self._roll())

    async def _roll(self) -> None:
        """Renew outdated processes one after another, each once the one before serves again.

        One that does not serve with its new settings ends it: they cost one process, and not all.
        """
        while outdated := self._outdated():
            logger.info("%s gets new settings", outdated[0].name)
            renewed = await self._renew(outdated[0])
            if renewed.member.phase is Phase.FAILED and not renewed.outdated:
                logger.error("%s does not serve with new settings, and the others keep theirs", renewed.name)
                self._kept = {k.name: k.wanted for k in self._staying()}
                break
        self._reconcile()

    def _outdated(self) -> list[Keeper]:
        """Those to be renewed. While one is down that failed with what it should have: none of its role, and none that
        the roll-out left out."""
        staying = self._staying()
        failed = {k.member.role for k in staying if k.member.phase is Phase.FAILED and not k.outdated}
        kept = self._kept if failed else {}
        return [k for k in staying if k.outdated and k.member.role not in failed and kept.get(k.name) != k.wanted]

    async def _renew(self, keeper: Keeper) -> Keeper:
        """Returns what serves in its place, or failed: the only worker of its pool gets a successor first, where there
        is room for one. One that failed stays to be seen, beside the worker, until the next change.
        """
        role = keeper.member.role
        if role != "router" and [k for k in self._of(role) if k.member.phase is Phase.READY] == [keeper]:
            successor = self._successor = self._add(role)
            phase = await self._until_serves(successor, Phase.UNPLACED, Phase.FAILED)
            if phase is Phase.FAILED and not successor.outdated:
                return successor
            self._successor = None
            if phase is Phase.READY:
                keeper.retire()
                await self._until(keeper, Phase.STOPPED)
                return successor
            successor.retire()
            if phase is Phase.FAILED:  # other settings have come meanwhile
                return successor
        keeper.renew()
        await self._until(keeper, Phase.DRAINING, Phase.PLACING)
        await self._until_serves(keeper, Phase.FAILED)
        return keeper

    async def _until_serves(self, keeper: Keeper, *phases: Phase) -> Phase:
        """Returns as soon as routers send work to the process, or it is in one of the phases, or gone."""
        while (phase := await self._until(keeper, Phase.READY, *phases)) is Phase.READY:
            await self._until_used(keeper)
            if keeper.member.serving:
                break
        return phase

    async def _until(self, keeper: Keeper, *phases: Phase) -> Phase:
        """Returns as soon as the process is in one of the phases, or gone."""
        while keeper.member.phase not in (*phases, Phase.STOPPED):
            await self._change.wait()
        return keeper.member.phase

    async def _until_used(self, keeper: Keeper) -> None:
        """Returns as soon as routers send work to the process, or it does not serve any more."""
        while keeper.member.role != "router" and keeper.member.serving and not self._links.use(keeper.member):
            await self._change.wait()

    def _member_changed(self, before: Member, after: Member) -> None:
        if before.serving != after.serving:
            self._is_settled = False
            self._routing_changed.set()
        if after.serving and not before.serving and self._keepers[after.name].outdated and self._successor is None:
            self._roll_outdated()  # it was starting while its settings changed
        self._wake()

    def _wake(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    def _preferred_nodes(self, name: str, nodes: Sequence[str]) -> Sequence[str]:
        members = [keeper.member for keeper in self._keepers.values() if keeper.name != name]
        return preferred_nodes(self._keepers[name].member.role, members, nodes, self.config.placement.pairs)

    # -- routers --

    async def _tell_routers(self) -> None:
        """Give every router the list of workers whenever it changes, and ask each how it fares."""
        try:
            while True:
                self._routing_changed.clear()
                await self._links.tell(keeper.member for keeper in self._keepers.values())
                self._is_settled = self._settled()
                if self._is_settled:
                    self.ready.set()
                self._wake()
                try:
                    async with asyncio.timeout(_STATUS_PERIOD_S if self.ready.is_set() else _STARTING_PERIOD_S):
                        await self._routing_changed.wait()
                except TimeoutError:
                    pass
        finally:
            await self._links.close()

    async def _watch_workers(self) -> None:
        """Replace workers that live and do not work."""
        try:
            while True:
                members = [keeper.member for keeper in self._keepers.values() if not keeper.ordered]
                unhealthy_s, hears_routers = self.config.restart.unhealthy_s, bool(self._links.views)
                problems = await self._watch.look(members, unhealthy_s, hears_routers=hears_routers)
                for name, reason in problems.items():
                    if name in self._keepers:
                        self._keepers[name].replace(reason)
                self._follow_switches(members)
                await asyncio.sleep(_WATCH_PERIOD_S)
        finally:
            await self._watch.close()

    def _follow_switches(self, asked: Sequence[Member]) -> None:
        """A worker that an operator gave another role counts in that pool, and is missing in none.

        Args: asked: as they were before they were asked; who has changed since is asked again first.
        """
        for keeper in self._keepers.values():
            member, serving = keeper.member, keeper.member.serving
            role = self._watch.roles.get(serving.address) if serving else None
            if role is None or role == member.role or member.role == "router" or keeper.ordered or member not in asked:
                continue
            logger.info("%s was made a %s worker by hand", member.name, role)
            try:
                sizes = {member.role: self.config.replicas(member.role) - 1, role: self.config.replicas(role) + 1}
                self.config = self.config.scaled(sizes)
            except ConfigError as error:
                logger.warning("the pools keep their sizes, and a worker is started in its place: %s", error.message)
            keeper.switch(role)
            self.apply(self.config)
            self.resized.set()
            return  # the next one at the next look

    async def _scale(self) -> None:
        """Let the policy change the size of the pools, while `scaling` is enabled."""
        while not self.ready.is_set():
            await self._change.wait()
        while True:
            await asyncio.sleep(self.config.scaling.period_s)
            if not self.config.scaling.enabled:
                self._scaling = None
                continue
            try:
                if self._scaling is None or self._scaling.outdated(self.config):
                    self._scaling = Scaling(self.config, self._log_dir)
            except ConfigError as error:
                logger.error("pools keep their sizes: %s", error.message)
                continue
            keepers = [keeper for keeper in self._keepers.values() if keeper is not self._successor]
            signals = self._scaling.signals.gather(
                time.monotonic(),
                [keeper.member for keeper in keepers],
                self._watch.statuses,
                self._links.counts,
                leaving={keeper.name for keeper in keepers if keeper.retiring},
            )
            try:
                decision = await asyncio.to_thread(self._scaling.decide, signals)
            except Exception:
                logger.exception("pools keep their sizes: the scaling policy failed")
                continue
            self._enact(decision)

    def _enact(self, decision: ScalingDecision) -> None:
        """All actions at once, so that both pools' sizes are one change."""
        if not decision.actions:
            return
        logger.info("scaling: %s", "; ".join(decision.reasons))
        there = {name: keeper for name, keeper in self._keepers.items() if not keeper.retiring}
        actions = [action for action in decision.actions if action.kind == "start" or action.worker in there]
        leaving = [there[action.worker] for action in actions if action.kind == "drain"]
        switching = {there[action.worker]: action.to_pool for action in actions if action.to_pool}
        sizes: dict[WorkerRole, int] = {pool: len([k for k in self._of(pool) if k not in leaving]) for pool in POOLS}
        for action in actions:
            if action.kind == "start":
                sizes[action.pool] += 1
            if action.to_pool is not None:
                sizes[action.pool] -= 1
                sizes[action.to_pool] += 1
        try:
            self.config = self.config.scaled(sizes)
        except ConfigError as error:  # processes that failed for good count here, and not in the decision
            logger.error("the decision cannot be carried out: %s", error.message)
            return
        for keeper in leaving:
            keeper.retire()
        for keeper, role in switching.items():
            keeper.switch(role)
        self.apply(self.config)
        self.resized.set()

    def _settled(self) -> bool:
        """Nothing starts, drains or runs with old settings, and every router knows who serves.

        Raises: SplitserveError: at start, a router refuses a worker.
        """
        keepers = self._keepers.values()
        if any(k.member.phase is not Phase.READY or k.ordered or k.outdated for k in keepers):
            return False
        if any(len(self._of(role)) != self._wanted(role) for role in _ROLES):
            return False
        try:
            return self._links.knows(k.member for k in keepers)
        except SplitserveError as error:
            if not self.ready.is_set():
                raise
            logger.error("%s", error.message)
            return False

    def _pool_view(self, role: WorkerRole) -> PoolView:
        fewest, most = self.config.bounds(role)
        ready = sum(k.member.phase is Phase.READY for k in self._of(role))
        return PoolView(role=role, wanted=self._wanted(role), ready=ready, fewest=fewest, most=most)

    # -- the end --

    async def _stop_all(self) -> None:
        """Routers first, so that no request meets a worker that is going; then workers, all at once."""
        self.stopping.set()
        for is_router in (True, False):
            keepers = [k for k in self._keepers.values() if (k.member.role == "router") == is_router]
            await asyncio.gather(*(keeper.remove(drain=False) for keeper in keepers))


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What went wrong first; a typed error if there is one."""
    typed, rest = group.split(SplitserveError)
    found: BaseException = typed or rest or group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found
