"""The router process: its options, its parts put together, start and stop."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..core import metrics
from ..core.errors import Unavailable
from ..core.events import Recorder
from ..core.metrics import RouterMetrics
from ..core.probes import Probes, serve_probes
from ..core.pulse import Pulse
from ..engine.model_files import resolve_model
from ..proto.rpc import CLIENT_FACING_OPTIONS
from ..proto.server import Ready, RpcServer, run
from ..proto.tls import Tls, probes_context
from ..scheduling.admission import Admission, AdmissionPolicy
from ..scheduling.policies.registry import DEFAULT_POLICY, load_policy
from ..scheduling.retries import RetryBudget, RetryRules
from .dispatch import Dispatcher
from .front_door import FrontDoor
from .frontend import ADMIN, INFERENCE, Inference, RouterAdmin, add_to_server
from .key_file import KeyFile
from .keys import ApiKeys, RequireKey
from .membership import WorkerPool
from .openai.app import make_app
from .openai.server import HttpServer
from .openai.tls import HttpTls
from .routing_view import RoutingView
from .text import ModelText

logger = logging.getLogger(__name__)

_HANGING_S = 8.0  # an event loop that has not run for this long


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOptions:
    """One router process. `port` and `metrics_port` 0 take free ports."""

    model: str  # whose tokenizer it uses: built in, a directory, a .gguf file or a hub id
    model_name: str = ""  # name that requests ask for, the same as the workers'; empty takes `model`
    prefill: tuple[str, ...] = ()  # host:port of each prefill worker; more come through SetWorkers
    decode: tuple[str, ...] = ()  # host:port of each decode or colocated worker
    host: str = "127.0.0.1"
    port: int = 50051
    metrics_port: int = 0
    http_port: int | None = None  # of the OpenAI-compatible API; None: not served
    api_key_file: Path | None = None  # keys asked of every caller; None: everybody may call
    controller_key_sha256: str = ""  # of the key that the cluster's controller calls with, in hex
    tls: Tls | None = None  # of this router, towards clients and workers; None: plain text
    http_client_cert: bool | None = None  # ask HTTP clients for a certificate; None: unless there are API keys
    router_id: str = ""  # unique in the cluster; empty makes one
    local_prefill_itl_s: float | None = None  # longest gap that a prompt computed on its decode worker may cause
    policy: str = DEFAULT_POLICY  # by which workers are chosen: scheduling/policies/registry.py knows the names
    max_queued: int = 256  # requests waiting for dispatch; more are refused
    max_live: int = 8_192  # requests not ended; more are refused
    prefill_bound_s: float = 0.2  # seconds of prefill work that a worker may have outstanding
    max_attempts: int = 3  # failures of a request before its error goes to the client
    max_worker_deaths: int = 2  # workers that may die computing one request before it is held to be the cause
    retry_ratio: float = 1.0  # retries of a minute, for each of its requests
    retry_floor: int = 64  # retries of a minute that are allowed in any case
    keep_answers_s: float = 30.0  # how long the answer to a finished request can be asked for again with its key
    default_timeout_s: float = 600.0  # deadline of a call that has none
    no_worker_wait_s: float = 4.0  # how long a request waits while nobody can serve it
    admission: AdmissionPolicy = "refuse"  # of requests that would have their first token too late
    ttft_target_s: float | None = None  # what too late is; None: after the request's deadline
    tpot_target_s: float | None = None  # longest decode step that new sequences may bring about; None: any
    ageing_s: float = 10.0  # waiting that is worth one step of priority
    drain_timeout_s: float = 5.0  # how long SIGTERM waits for live requests
    trace_dir: Path | None = None


class Router:
    """One router: made on a running event loop, then `start` and `stop`.

    Raises: AddressInUse, ModelLoadFailed, ConfigError: it cannot start.
    """

    def __init__(self, options: RouterOptions) -> None:
        self.options = options
        self.boot_id = secrets.token_hex(8)
        model_name = options.model_name or options.model
        self._registry = metrics.new_registry()
        self.metrics = RouterMetrics(self._registry)
        text = ModelText(resolve_model(options.model, weights=False), self.metrics.tokenizations.inc)
        self.recorder = Recorder(options.router_id or "router", options.trace_dir)
        self.pool = WorkerPool(
            model_name, self.boot_id, self.metrics, tpot_target_s=options.tpot_target_s, tls=options.tls
        )
        admission = Admission(
            max_queued=options.max_queued,
            max_live=options.max_live,
            policy=options.admission,
            ttft_target_s=options.ttft_target_s,
        )
        self.dispatcher = Dispatcher(
            self.pool,
            RoutingView(
                self.pool,
                self.metrics,
                prefill_bound_s=options.prefill_bound_s,
                local_prefill_itl_s=options.local_prefill_itl_s,
                ttft_target_s=admission.ttft_target_s,
            ),
            admission,
            self.metrics,
            self.recorder,
            policy=load_policy(options.policy),
            retries=RetryRules(
                max_attempts=options.max_attempts,
                max_deaths=options.max_worker_deaths,
                budget=RetryBudget(ratio=options.retry_ratio, floor=options.retry_floor),
            ),
            keep_answers_s=options.keep_answers_s,
            no_worker_wait_s=options.no_worker_wait_s,
            ageing_s=options.ageing_s,
        )
        self._door = FrontDoor(
            model_name,
            text,
            self.pool,
            self.dispatcher,
            default_timeout_s=options.default_timeout_s,
            no_worker_wait_s=options.no_worker_wait_s,
        )
        keys = None
        if options.api_key_file is not None:
            controller = bytes.fromhex(options.controller_key_sha256)
            keys = ApiKeys(KeyFile(options.api_key_file).keys, self.metrics.links, controller)
        interceptors = [RequireKey(keys)] if keys is not None else []
        self._rpc = RpcServer(
            options.host,
            options.port,
            [INFERENCE, ADMIN],
            interceptors,
            CLIENT_FACING_OPTIONS,
            tls=options.tls,
            links=self.metrics.links,
        )
        admin = RouterAdmin(self.pool, self.dispatcher, options.router_id)
        add_to_server(self._rpc.server, Inference(self._door), admin)
        self._pulse = Pulse(_HANGING_S)
        self._probes: Probes | None = None
        self._health: asyncio.Task[None] | None = None
        self._http: HttpServer | None = None
        if options.http_port is not None:
            app = make_app(self._door, self._registry, int(time.time()), keys)
            front = None
            if options.tls is not None:
                ask = options.http_client_cert if options.http_client_cert is not None else keys is None
                front = HttpTls(options.tls, self.metrics.links, ask=ask)
            self._http = HttpServer(app, options.host, options.http_port, front)

    @property
    def address(self) -> str:
        return self._rpc.address

    @property
    def http_address(self) -> str:
        """host:port of the OpenAI-compatible API; empty if it is not served."""
        return self._http.address if self._http is not None else ""

    async def start(self) -> Ready:
        """Serve. Health says serving as soon as a pair of workers is ready."""
        options = self.options
        self._probes = probes = serve_probes(
            options.host,
            options.metrics_port,
            registry=lambda: self._registry,
            alive=self._pulse.silence,
            ready=lambda: self._pulse.silence() or self._door.out_of_service,
            tls=probes_context(options.tls),
        )
        self._pulse.start()
        await self._rpc.start()
        await self._rpc.set_serving(False)
        self._health = asyncio.create_task(self._tell_health())
        self.pool.set_workers(options.prefill, options.decode, self.dispatcher)
        if self._http is not None:
            await self._http.start()
        logger.info("router on %s, HTTP on %s, metrics on port %d", self.address, self.http_address, probes.port)
        host = self.address.rpartition(":")[0]
        return Ready(
            address=self.address,
            metrics_address=f"{host}:{probes.port}",
            pid=os.getpid(),
            boot_id=self.boot_id,
            http_address=self.http_address,
        )

    async def stop(self, drain_timeout_s: float = 0.0) -> None:
        """Take no new requests, give live ones `drain_timeout_s`, end the rest with a typed error, and go."""
        self._door.draining = True
        if self._health is not None:
            self._health.cancel()
            await self._rpc.set_serving(False)
        try:
            async with asyncio.timeout(drain_timeout_s):
                await self.dispatcher.idle.wait()
        except TimeoutError:
            self.dispatcher.close(Unavailable("the router is shutting down; send the request again", retry_after_s=1.0))
        if self._http is not None:
            await self._http.stop()
        await self._rpc.stop()
        await self.pool.close()
        self._pulse.stop()
        if self._probes is not None:
            self._probes.stop()
        self.recorder.close()

    async def _tell_health(self) -> None:
        while True:
            await self.pool.usable_changed.wait()
            self.pool.usable_changed.clear()
            await self._rpc.set_serving(self.pool.usable)
            logger.info("%s", "serving" if self.pool.usable else "not serving: no pair of workers is ready")


async def serve_async(options: RouterOptions, ready: Callable[[Ready], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT. `ready` is called once the address answers."""
    router = Router(options)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    try:
        told = await router.start()
        if ready is not None:
            ready(told)
        await stopped.wait()
    finally:
        await router.stop(options.drain_timeout_s)


def serve(options: RouterOptions, ready: Callable[[Ready], None] | None = None) -> None:
    """Run a router in this process. Raises: SplitserveError: it cannot start."""
    run(serve_async(options, ready))
