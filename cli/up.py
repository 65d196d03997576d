"""`splitserve up`: starts a cluster on Ray, shows how it fares, and stops it."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.config import WORKER_ROLES, ClusterConfig, load_config
from ..core.errors import ConfigError, SplitserveError
from ..core.state import write_state
from ..deploy.changes import NOTHING_CHANGES
from ..deploy.claim import claim_local_cluster
from ..deploy.process import report_ready
from ..deploy.ray_environment import prepare_ray_environment
from ..deploy.scaler import check_scaling
from ..engine.model_files import check_local_model
from .attached import attached, cluster_state, remember_routers, running_state
from .background import continue_in_background, continue_in_own_session
from .screen import REFRESH_S, Screen, check_none_is_stuck, follow

if TYPE_CHECKING:  # Ray must not be imported before its environment is prepared
    from ..deploy.cluster_handle import ClusterHandle
    from ..deploy.members import ClusterView


def command(
    file: Annotated[Path | None, typer.Argument(help="YAML file; flags go over it.", show_default="none")] = None,
    config_file: Annotated[Path | None, typer.Option("--config", help="The same, as an option.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Directory, .gguf file, hub id or built-in name.", show_default="smollm2-135m"),
    ] = None,
    prefill: Annotated[int | None, typer.Option(help="Prefill workers.", show_default="1")] = None,
    decode: Annotated[int | None, typer.Option(help="Decode workers.", show_default="1")] = None,
    colocated: Annotated[int | None, typer.Option(help="Workers that do both.", show_default="0")] = None,
    routers: Annotated[int | None, typer.Option(help="Routers, on consecutive ports.", show_default="1")] = None,
    host: Annotated[str | None, typer.Option(help="Address of the routers.", show_default="127.0.0.1")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port of the first router; 0 takes a free one.", show_default="50051")
    ] = None,
    http_port: Annotated[
        int | None,
        typer.Option(help="Port of the first router's OpenAI API; 0 takes a free one, -1 none.", show_default="8000"),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File of API keys, asked of every caller.", show_default="none")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of each worker.", show_default="cores divided by workers")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="float32 on CPU")
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Most tokens of prompt and answer together.")] = None,
    kv_memory: Annotated[
        str | None, typer.Option(help="Memory of each worker's KV pool, such as 512MiB.", show_default="1GiB")
    ] = None,
    transport: Annotated[
        str | None, typer.Option(help="auto, cuda-ipc, shared-memory, nccl or grpc.", show_default="auto")
    ] = None,
    trace_dir: Annotated[Path | None, typer.Option(help="Write step records and request events here.")] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Write the processes' logs here.")] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to join, as HOST:PORT; or auto.", show_default="a local one is started"),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds that each process may take to serve.", show_default="300")
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once it serves; `splitserve down` stops it.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would do, and do nothing.")] = False,
    ready_file: Annotated[Path | None, typer.Option(help="Write one JSON line here once it serves.")] = None,
) -> None:
    """Start a cluster: routers, prefill workers and decode workers, on a Ray of its own or one that runs.

    Without flags: one of each on this machine, with a small built-in model. Ctrl-C drains and stops everything;
    a second Ctrl-C does not wait.

    What has no flag here is a key of the file: TLS between all parts (security.*: docs/security.md), scaling, placement
    and the rest (docs/configuration.md).

    If the cluster runs already, it is changed to what the file and the flags say: workers are added, drained and
    removed, or restarted one after another with their new settings.

    $ splitserve up

    $ splitserve up --prefill 2 --decode 2 --model ./my-model --detach

    $ splitserve up cluster.yaml --dry-run
    """
    overrides = {
        "model": model,
        "prefill.replicas": prefill,
        "decode.replicas": decode,
        "colocated.replicas": colocated,
        "router.replicas": routers,
        "router.host": host,
        "router.port": port,
        "router.http_port": http_port,
        "router.api_key_file": api_key_file,
        **{f"{pool}.threads": threads for pool in ("prefill", "decode", "colocated")},
        "engine.dtype": dtype,
        "engine.max_model_len": max_model_len,
        "engine.kv_memory": kv_memory,
        "transport": transport,
        "trace_dir": trace_dir,
        "log_dir": log_dir,
        "ray.address": ray_address,
        "startup_timeout_s": timeout,
    }
    config = load_config(config_file or file, overrides)
    if config.ray.address is None:  # elsewhere, only the nodes know
        check_local_model(config.model)
    if running_state() is not None:
        _change(config, dry_run=dry_run)
        return
    check_scaling(config)
    if dry_run:
        print("\n".join(_what_starts(config)))
        return
    if detach:
        ready_file = continue_in_background()
    else:
        continue_in_own_session()
    try:
        with claim_local_cluster() as claim:
            if _run(config, ready_file, detach=detach):
                claim.leave()
    except SplitserveError as error:
        report_ready(ready_file, {"error": error.code, "message": error.message})
        raise


def _change(config: ClusterConfig, *, dry_run: bool) -> None:
    """Make of the cluster that runs what the configuration says.

    Raises: ConfigError: this cannot be. Unavailable: it is so already, and a process stays down.
    """

    async def change(handle: ClusterHandle) -> None:
        text = await handle.preview(config)
        if text == NOTHING_CHANGES:  # which would read as if all were well
            check_none_is_stuck(await handle.view())
        print(text, flush=True)
        if dry_run or text == NOTHING_CHANGES:
            return
        await handle.apply(config)
        screen = Screen()
        view = await follow(handle, screen)
        remember_routers(view)
        screen.say(f"[green]done[/]: {config.model} at [bold]{', '.join(view.router_addresses)}[/]")

    with attached() as handle:
        asyncio.run(change(handle))


def _what_starts(config: ClusterConfig) -> list[str]:
    counts = [("router", config.router.replicas), *((f"{role} worker", config.replicas(role)) for role in WORKER_ROLES)]
    where = "a Ray of its own on this machine" if config.ray.address is None else f"Ray at {config.ray.address}"
    lines = [f"starts {count} {name}{'s' if count > 1 else ''}" for name, count in counts if count]
    return [f"no cluster runs; would serve {config.model} on {where}:", *lines]


def _run(config: ClusterConfig, ready_file: Path | None, *, detach: bool) -> bool:
    """Returns whether the cluster goes on without this process. Raises: SplitserveError: it cannot start or serve."""
    screen = Screen()
    prepare_ray_environment(config.ray.address)
    screen.say("starting Ray" if config.ray.address is None else f"joining Ray at {config.ray.address}")
    from ..deploy.cluster import cluster_ray, new_log_dir
    from ..deploy.members import MemberFailed

    log_dir = new_log_dir(config)
    try:
        with cluster_ray(config) as config:
            # A Ray of our own ends with this process.
            leave = detach and config.ray.address is not None
            asyncio.run(_serve(config, log_dir, screen, ready_file, leave=leave))
    except MemberFailed as error:
        screen.show_log(error)
        report_ready(ready_file, {"error": error.code, "message": error.message})
        raise typer.Exit(2) from error
    except KeyboardInterrupt:  # while Ray was starting
        raise typer.Exit(130) from None
    if not leave:
        screen.say("everything has stopped")
    return leave


async def _serve(config: ClusterConfig, log_dir: Path, screen: Screen, ready_file: Path | None, *, leave: bool) -> None:
    """Until the cluster has ended or, with `leave`, serves."""
    from ..deploy.cluster_handle import ClusterHandle, raise_refusal
    from ..deploy.throughput import Throughput

    handle = await asyncio.to_thread(ClusterHandle.find)
    if handle is not None:
        raise ConfigError(
            f"a cluster runs in the Ray namespace {config.ray.namespace!r} already; change it where it was "
            "started, or set ray.namespace to another"
        )
    handle = await asyncio.to_thread(ClusterHandle.start, config, log_dir)
    stopper = _Stopper(handle, screen)
    throughput = Throughput()
    remembered = None
    with screen:
        while (outcome := await handle.outcome()) is None:
            view = await handle.view()
            await throughput.measure({m.name: m.endpoint.metrics_address for m in view.members if m.endpoint})
            screen.show(view, throughput)
            state = cluster_state(config, view, log_dir, leave=leave)
            if view.ready and state != remembered and not stopper.stopping.is_set():
                write_state(state)
                if remembered is None:
                    _announce(config, view, screen, log_dir, ready_file)
                    if leave:
                        return
                remembered = state
            await asyncio.sleep(REFRESH_S)
    await handle.dismiss()
    if outcome.refusal is not None:
        raise_refusal(outcome.refusal)


class _Stopper:
    """Turns signals into orders to the controller; the second means hurry."""

    def __init__(self, handle: ClusterHandle, screen: Screen) -> None:
        self.stopping = asyncio.Event()
        self._handle = handle
        self._screen = screen
        self._tasks: set[asyncio.Task[None]] = set()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._stop)

    def _stop(self) -> None:
        hurry = self.stopping.is_set()
        self._screen.say("stopping at once" if hurry else "stopping; once more does not wait for requests")
        self.stopping.set()
        task = asyncio.create_task(self._handle.stop())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _announce(config: ClusterConfig, view: ClusterView, screen: Screen, log_dir: Path, ready_file: Path | None) -> None:
    """The cluster serves: tell a waiting parent and the person."""
    row: dict[str, str | int] = {
        "address": view.router_addresses[0],
        "http_address": view.http_addresses[0] if view.http_addresses else "",
        "log_dir": str(log_dir),
        "pid": os.getpid(),
    }
    report_ready(ready_file, row)
    screen.announce(config.model, view, log_dir)
