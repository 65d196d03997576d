"""A process that hosts one engine: model, device loop, gRPC server, metrics, status and health, for every role."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import secrets
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import Draining, ModelUnsupported, Unavailable
from ..core.events import Recorder
from ..core.metrics import WorkerMetrics, new_registry
from ..core.probes import Probes, serve_probes
from ..core.pulse import Pulse
from ..engine.engine import Engine
from ..engine.loading import load_model
from ..engine.loop import DeviceLoop
from ..engine.outputs import StepOutput
from ..engine.parallel.ranks import start_ranks
from ..kv_transfer.capability import Granter
from ..kv_transfer.identity import WorkerIdentity, current_host_id
from ..kv_transfer.ranges import KvLayout
from ..proto import worker_pb2, worker_pb2_grpc
from ..proto.convert import PROTOCOL_VERSION
from ..proto.mount import ServiceMount
from ..proto.server import Ready, RpcServer
from ..proto.tls import probes_context
from .admin import ROLES, WorkerAdmin
from .device import DeviceReader, DeviceState, open_devices
from .measured import Measured
from .options import Role, WorkerOptions
from .quiet import Quiet
from .rank_links import ENTRY as RANK_ENTRY
from .rank_links import RankLink, RankSettings
from .role import Holder, RoleHooks, RoleSwitch
from .session import Session

logger = logging.getLogger(__name__)

_ADMIN = "splitserve.v1.WorkerAdmin"
# Whatever its role is or becomes: what reflection tells of.
SERVICES = ("splitserve.v1.PrefillWorker", "splitserve.v1.DecodeWorker", "splitserve.v1.KvTransfer", _ADMIN)
_HEALTH_PERIOD_S = 1.0
_HAND_OVER_S = 2.0  # for what was handed over to be let go of, and for sessions to end


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained:
    """How a drain went."""

    num_handed_over: int  # requests that routers were told to take elsewhere
    num_left: int  # that could not be let go of


class WorkerHost:
    """Everything about a worker that does not depend on its role.

    It has one role at a time: `take_role`. The role registers its services on `mount`, and counts its requests in
    `num_runs` through `run_started` and `run_ended`.

    Raises: AddressInUse, ModelLoadFailed, ModelUnsupported, ConfigError: it cannot start.
    """

    def __init__(self, options: WorkerOptions) -> None:
        self.options = options
        self.switch: RoleSwitch | None = None  # None: its role is for life
        self.registry = new_registry()
        self.metrics = WorkerMetrics(self.registry, options.role)
        # The address is taken before the model is loaded: a port in use is told at once.
        self.rpc = RpcServer(options.host, options.port, SERVICES, tls=options.tls, links=self.metrics.links)
        self.mount = ServiceMount()
        self.rpc.server.add_generic_rpc_handlers((self.mount,))
        self.identity = WorkerIdentity(
            worker_id=options.worker_id or f"{options.role}-{self.rpc.port}",
            boot_id=secrets.token_hex(8),
            host_id=current_host_id(),
        )
        self.recorder = Recorder(self.identity.worker_id, options.trace_dir)
        # The ranks of a colocated worker keep their KV to themselves.
        self._moves_kv = options.engine.tensor_parallel == 1 or options.role != "colocated"
        if self._moves_kv:
            settings = RankSettings(
                worker_id=self.identity.worker_id,
                boot_id=self.identity.boot_id,
                host_id=self.identity.host_id,
                host=options.host,
                transports=options.transports,
                lease_s=options.lease_s,
                tls=options.tls,
            )
            self._ranks = start_ranks(options.engine, entry=RANK_ENTRY, mover=settings.to_json())
        else:
            self._ranks = start_ranks(options.engine)
        try:
            self.model = load_model(options.engine, None if self._ranks is None else self._ranks.group)
            self.layout = KvLayout(geometry=self.model.whole, num_ranks=options.engine.tensor_parallel)
            if self._moves_kv and self.layout.rank_geometry(0) != self.model.geometry:
                raise ModelUnsupported(
                    f"{options.model_name or options.engine.model}: every rank holds all KV heads of some layers, and "
                    "such KV does not move between workers yet; use colocated workers, or --tensor-parallel 1"
                )
            sends_kv = None if options.role == "colocated" else self._kv_written
            self.engine = Engine(
                self.model, options.engine, recorder=self.recorder, kv_written=sends_kv, others=self._ranks
            )
        except BaseException:
            if self._ranks is not None:
                self._ranks.close()
            raise
        links = self._ranks.links if self._ranks is not None and self._moves_kv else []
        self.rank_links = [RankLink(link) for link in links]  # to ranks 1 to N - 1
        self.rank_addresses: list[str] = []  # that their KV is fetched from
        self._secret = secrets.token_bytes(32)
        self.granter = Granter(self._secret)
        self.devices: DeviceReader = open_devices(self.model.model.device, options.engine.tensor_parallel)
        self.fault = ""  # why this worker is out of service; what is broken stays broken until somebody restarts it
        self.draining = False
        self.num_runs = 0
        self.sessions: set[Session[Any, Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._role: RoleHooks | None = None
        self._no_sessions = asyncio.Event()
        self._stop = asyncio.Event()  # the first signal
        self._hurry = asyncio.Event()  # the second
        self._loop = asyncio.get_running_loop()
        self._device = DeviceLoop(self.engine, self._step_done)
        self._pulse = Pulse(options.stall_bound_s)
        self._probes: Probes | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._device_states: Sequence[DeviceState] = ()
        self.measured = Measured(self.engine, self.metrics)
        self.quiet = Quiet()
        worker_pb2_grpc.add_WorkerAdminServicer_to_server(WorkerAdmin(self), self.rpc.server)

    async def start(self) -> Ready:
        """Start serving; the address is reachable when this returns."""
        self._probes = probes = serve_probes(
            self.options.host,
            self.options.metrics_port,
            registry=lambda: self.registry,
            alive=lambda: self.stuck,
            ready=lambda: self.stuck or self.out_of_service,
            tls=probes_context(self.options.tls),
        )
        self.rank_addresses = [await link.start(self.layout, self._secret) for link in self.rank_links]
        self._device.start()
        self._pulse.start()
        await self.rpc.start()
        self._tasks.append(asyncio.create_task(self._watch_health()))
        return Ready(
            address=self.rpc.address,
            metrics_address=f"{self.options.host}:{probes.port}",
            pid=os.getpid(),
            boot_id=self.identity.boot_id,
        )

    def take_role(self, role: RoleHooks) -> None:
        """Run requests this way from now on."""
        self._role = role
        self.rpc.offer((*role.services, _ADMIN))

    async def leave_role(self, successor: Role) -> None:
        """End every session of the role, free what it holds, and be somebody else for whoever knew it.

        A new boot id, so that no grant, frame or message of the old role is taken for the new; metrics begin anew.
        """
        assert self._role is not None, "it has no role to leave"
        self.mount.clear()
        await self._end_sessions()
        await self._role.close()
        self._role = None
        self.options = dataclasses.replace(self.options, role=successor)
        self.identity = dataclasses.replace(self.identity, boot_id=secrets.token_hex(8))
        self.registry = new_registry()
        self.metrics = WorkerMetrics(self.registry, successor, self.metrics.links)
        self.measured.publish_in(self.metrics)

    async def _end_sessions(self) -> None:
        for session in self.sessions:
            session.end()
        if self.sessions and not await _within(_HAND_OVER_S, self._no_sessions):
            logger.warning("%d routers do not read their sessions to the end", len(self.sessions))
            for session in self.sessions:
                session.abort()

    def take_signals(self) -> None:
        """From here on SIGTERM and SIGINT ask for the end; before anybody is told that this worker serves."""

        def signalled() -> None:
            (self._hurry if self._stop.is_set() else self._stop).set()

        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, signalled)

    async def run_until_signalled(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain; a second signal hands over at once what still runs."""
        await self._stop.wait()
        logger.info("draining %d requests", self.num_runs)
        drain = asyncio.create_task(self.drain(self.options.drain_timeout_s))
        now = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({drain, now}, return_when=asyncio.FIRST_COMPLETED)
        for task in (drain, now):
            task.cancel()
        if self.num_runs:
            await self.drain(0.0)

    async def stop(self) -> None:
        """Fail what still runs, and go."""
        for task in self._tasks:
            task.cancel()
        if self._role is not None:
            await self._role.close()
        await self._end_sessions()
        await self.rpc.stop()
        self._pulse.stop()
        await asyncio.to_thread(self._device.stop)
        for link in self.rank_links:
            await link.close()
        if self._ranks is not None:
            await asyncio.to_thread(self._ranks.close)
        if self._probes is not None:
            self._probes.stop()
        self.recorder.close()

    def wake(self) -> None:
        """There is new work for the engine."""
        self._device.wake()

    def release(self, sequence: str) -> None:
        """Free what a sequence has in the engine; whoever waits for blocks may go on."""
        if self.engine.release(sequence):
            self._device.wake()

    def run_started(self) -> None:
        self.num_runs += 1
        self._idle.clear()

    def run_ended(self) -> None:
        self.num_runs -= 1
        if self.num_runs == 0:
            self._idle.set()
        for session in self.sessions:
            session.status_changed()

    def refuse_if_out_of_service(self) -> None:
        """Raises: Unavailable."""
        if self.fault:
            raise Unavailable(f"worker {self.identity.worker_id} is out of service: {self.fault}")
        if self.draining:
            raise Draining(f"worker {self.identity.worker_id} is draining; send the request to another")

    async def drain(self, timeout_s: float) -> Drained:
        """Take no new work, give what runs `timeout_s`, then have the routers take the rest elsewhere."""
        if not self.draining:
            self.draining = True
            for session in self.sessions:
                session.announce_status()
        await self.rpc.set_serving(False)
        num_handed_over = 0
        if not await _within(timeout_s, self._idle):
            num_handed_over = self.num_runs
            logger.info("handing %d requests over after %.1f s of draining", num_handed_over, timeout_s)
            assert self._role is not None, "requests run without a role"
            self._role.hand_over(
                Draining(f"worker {self.identity.worker_id} is draining; {timeout_s:g} s of grace are over")
            )
            if not await _within(_HAND_OVER_S, self._idle):
                logger.warning("%d requests cannot be let go of", self.num_runs)
        return Drained(num_handed_over=num_handed_over, num_left=self.num_runs)

    async def undrain(self) -> None:
        """Take work again."""
        self.draining = False
        for session in self.sessions:
            session.status_changed()
        await self.rpc.set_serving(self.is_healthy)

    @property
    def stuck(self) -> str:
        """Why it counts as hanging, from any thread; "" while it makes progress or has nothing to do."""
        if self._device.ended:
            return "the thread that runs its steps ended with an error; its log has it"
        if self._device.stalled(self.options.stall_bound_s):
            return f"work is queued and no step finished for {self.options.stall_bound_s:g} s or more"
        return self._pulse.silence()

    @property
    def out_of_service(self) -> str:
        """Why it takes no work although it makes progress; "" if it does."""
        return self.fault or ("it is draining" if self.draining else "")

    @property
    def is_healthy(self) -> bool:
        """Whether it makes progress on sound devices and takes work."""
        return not (self.stuck or self.out_of_service)

    def session_began(self, session: Session[Any, Any]) -> None:
        session.prefixes = self.engine.follow_prefixes()
        self.sessions.add(session)
        self._no_sessions.clear()

    def session_ended(self, session: Session[Any, Any]) -> None:
        self.sessions.discard(session)
        if session.prefixes is not None:
            self.engine.unfollow_prefixes(session.prefixes)
        if not self.sessions:
            self._no_sessions.set()

    def restart_prefixes(self, session: Session[Any, Any]) -> None:
        """Its router has lost track of the prefix cache."""
        if session.prefixes is not None:
            self.engine.restart_prefixes(session.prefixes)
            session.status_changed()

    # -- what routers and operators are told --

    def info(self) -> worker_pb2.WorkerInfo:
        geometry = self.engine.geometry
        return worker_pb2.WorkerInfo(
            protocol_version=PROTOCOL_VERSION,
            worker_id=self.identity.worker_id,
            boot_id=self.identity.boot_id,
            role=ROLES[self.options.role],
            model=self.options.model_name or self.options.engine.model,
            # Another digest keeps those apart whose KV does not move.
            geometry_digest=self.layout.geometry.digest() + ("" if self._moves_kv else "-stays"),
            max_model_len=self.engine.max_model_len,
            vocab_size=self.engine.vocab_size,
            eos_token_ids=sorted(self.model.eos_token_ids),
            block_size=self.options.engine.block_size,
            kv_bytes_per_token=geometry.bytes_per_token,
            kv_address=self.options.kv_address or self.rpc.address,
            kv_rank_addresses=self.rank_addresses,
            pid=os.getpid(),
            max_step_tokens=self.options.engine.max_step_tokens,
            kv_dtype=geometry.dtype,
            tensor_parallel=self.options.engine.tensor_parallel,
            prefix_model_id=self.model.model_id,
            host_id=self.identity.host_id,
            labels=self.options.labels,
            local_prefill=self.options.local_prefill,
            late_grants=True,
            grant_headroom_tokens=self.options.engine.decode_headroom_tokens,
        )

    def holders(self) -> list[Holder]:
        """Who holds blocks for what."""
        return list(self._role.holders()) if self._role is not None else []

    def status(self, session: Session[Any, Any] | None = None) -> worker_pb2.WorkerStatus:
        """How it fares; for a router's session also what changed in the prefix cache since it was told last."""
        usage = self.engine.usage()
        return worker_pb2.WorkerStatus(
            num_blocks=usage.blocks_total,
            num_free_blocks=usage.blocks_free,
            num_cached_blocks=usage.blocks_cached,
            num_granted_blocks=usage.blocks_granted,
            num_running=usage.num_running,
            num_waiting=usage.num_waiting,
            num_held=usage.num_held,
            num_outstanding_prefill_tokens=usage.outstanding_prefill_tokens,
            prefill_tokens_per_s=self.measured.prefill_tokens_per_s,
            decode_step_s=self.measured.decode_step_s,
            decode_batch=self.measured.decode_batch,
            num_steps=self.engine.num_steps,
            draining=self.draining,
            stalled=self._device.stalled(self.options.stall_bound_s),
            devices=[_device_status(state) for state in self._device_states],
            fault=self.fault,
            prefix_blocks=None if session is None else self._prefix_blocks(session),
        )

    def _prefix_blocks(self, session: Session[Any, Any]) -> worker_pb2.PrefixBlocks | None:
        if session.prefixes is None or (changes := self.engine.take_prefixes(session.prefixes)) is None:
            return None
        if session.prefixes.has_news:  # more than goes into one message
            session.status_changed()
        return worker_pb2.PrefixBlocks(
            number=changes.number, restarts=changes.restarts, added=changes.added, removed=changes.removed
        )

    # -- after each step --

    def _step_done(self, output: StepOutput) -> None:  # device thread
        self._loop.call_soon_threadsafe(self._deliver, output)

    def _deliver(self, output: StepOutput) -> None:
        self.measured.step(output, self.options.role)
        if self._role is not None:
            self._role.on_step(output)
        record = output.record
        self.quiet.stepped(record.at_s + record.schedule_s + record.run_s, record.run_s)

    def _kv_written(self, sequence: str, layer_start: int, layer_end: int, token_start: int, token_end: int) -> None:
        if self._role is not None and self._role.kv_written is not None:  # device thread
            self._role.kv_written(sequence, layer_start, layer_end, token_start, token_end)

    async def _watch_health(self) -> None:
        """Health means progress on sound devices: NOT_SERVING while it stalls, drains or is broken."""
        serving = True
        while True:
            await self._read_devices()
            await asyncio.sleep(_HEALTH_PERIOD_S)
            if self.is_healthy != serving:
                serving = self.is_healthy
                await self.rpc.set_serving(serving)

    async def _read_devices(self) -> None:
        self._device_states = await asyncio.to_thread(self.devices.read)
        for state in self._device_states:
            self.measured.device(state)
            if state.fault and not self.fault:
                self.fault = state.fault
                logger.error("out of service: %s", state.fault)
                for session in self.sessions:
                    session.status_changed()


async def _within(timeout_s: float, event: asyncio.Event) -> bool:
    """Wait for an event; False when the time is up."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return event.is_set()
    return True


def _device_status(state: DeviceState) -> worker_pb2.DeviceStatus:
    return worker_pb2.DeviceStatus(**dataclasses.asdict(state))
