"""`splitserve up`: starts a cluster on Ray, shows how it fares, and stops it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live

from ..core.config import ClusterConfig, load_config
from ..core.errors import SplitserveError
from ..core.state import ClusterState, write_state
from ..deploy.claim import claim_local_cluster
from ..deploy.process import report_ready
from ..deploy.ray_environment import prepare_ray_environment
from .background import continue_in_background, continue_in_own_session
from .status import Row, cluster_table, worker_row

if TYPE_CHECKING:  # Ray must not be imported before its environment is prepared
    from ..deploy.controller import ClusterView, Controller, MemberFailed
    from ..deploy.throughput import Throughput

_REFRESH_S = 0.5


def command(
    config_file: Annotated[Path | None, typer.Option("--config", help="YAML file; flags go over it.")] = None,
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
        str | None, typer.Option(help="auto, cuda-ipc, shared-memory or grpc.", show_default="auto")
    ] = None,
    trace_dir: Annotated[Path | None, typer.Option(help="Write step records and request events here.")] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Write the processes' logs here.")] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster to join, as HOST:PORT.", show_default="a local one is started")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds that each process may take to serve.", show_default="300")
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once it serves; `splitserve down` stops it.")
    ] = False,
    ready_file: Annotated[Path | None, typer.Option(help="Write one JSON line here once it serves.")] = None,
) -> None:
    """Start a cluster: routers, prefill workers and decode workers, on a Ray of its own or one that runs.

    Without flags: one of each on this machine, with a small built-in model. Ctrl-C drains and stops everything;
    a second Ctrl-C does not wait.

    $ splitserve up

    $ splitserve up --prefill 2 --decode 2 --model ./my-model --detach

    $ splitserve up --config cluster.yaml --port 0
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
    config = load_config(config_file, overrides)
    if detach:
        ready_file = continue_in_background()
    else:
        continue_in_own_session()
    try:
        with claim_local_cluster():
            _run(config, ready_file)
    except SplitserveError as error:
        report_ready(ready_file, {"error": error.code, "message": error.message})
        raise


def _run(config: ClusterConfig, ready_file: Path | None) -> None:
    """Raises: SplitserveError: it cannot start, or cannot serve any more."""
    prepare_ray_environment(config.ray.address)
    screen = Screen()
    screen.say("starting Ray" if config.ray.address is None else f"joining Ray at {config.ray.address}")
    from ..deploy.cluster import cluster_ray, new_log_dir
    from ..deploy.controller import MemberFailed

    log_dir = new_log_dir(config)
    try:
        with cluster_ray(config):
            asyncio.run(_serve(config, log_dir, screen, ready_file))
    except MemberFailed as error:
        screen.show_log(error)
        report_ready(ready_file, {"error": error.code, "message": error.message})
        raise typer.Exit(2) from error
    except KeyboardInterrupt:  # while Ray was starting
        raise typer.Exit(130) from None
    screen.say("everything has stopped")


async def _serve(config: ClusterConfig, log_dir: Path, screen: Screen, ready_file: Path | None) -> None:
    from ..deploy.cluster import running_cluster
    from ..deploy.throughput import Throughput

    async with running_cluster(config, log_dir) as controller:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, _stop, controller, screen)
        with screen:
            throughput = Throughput()
            ready = False
            while not controller.stopping.is_set():
                view = controller.view()
                await throughput.measure({m.name: m.endpoint.metrics_address for m in view.members if m.endpoint})
                screen.show(view, throughput)
                if view.ready and not ready:
                    ready = True
                    _announce(config, view, screen, log_dir, ready_file)
                try:
                    async with asyncio.timeout(_REFRESH_S):
                        await (controller.stopping if ready else controller.ready).wait()
                except TimeoutError:
                    continue


def _stop(controller: Controller, screen: Screen) -> None:
    screen.say("stopping at once" if controller.stopping.is_set() else "stopping; once more does not wait for requests")
    controller.stop()


def _announce(config: ClusterConfig, view: ClusterView, screen: Screen, log_dir: Path, ready_file: Path | None) -> None:
    """The cluster serves: tell other commands, a waiting parent and the person."""
    routers = view.router_addresses
    metrics = tuple(member.endpoint.metrics_address for member in view.members if member.endpoint)
    namespace = config.ray.namespace
    write_state(
        ClusterState(
            router_addresses=routers,
            namespace=namespace,
            pid=os.getpid(),
            metrics_addresses=metrics,
            http_addresses=view.http_addresses,
        )
    )
    http = view.http_addresses[0] if view.http_addresses else ""
    row: dict[str, str | int] = {
        "address": routers[0],
        "http_address": http,
        "log_dir": str(log_dir),
        "pid": os.getpid(),
    }
    report_ready(ready_file, row)
    screen.announce(config.model, view, log_dir)


class Screen:
    """What a person sees: a live table on a terminal, one line for each change elsewhere."""

    def __init__(self) -> None:
        self._console = Console()
        self._started = time.monotonic()
        self._live: Live | None = None
        self._seen: dict[str, str] = {}

    def __enter__(self) -> None:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        self._console.print(
            f"[dim]{time.monotonic() - self._started:6.1f} s[/]  {text}", highlight=False, soft_wrap=True
        )

    def announce(self, model: str, view: ClusterView, log_dir: Path) -> None:
        self.say(f"[green]ready[/]: {model} at [bold]{', '.join(view.router_addresses)}[/], logs in {log_dir}")
        if view.http_addresses:
            urls = ", ".join(f"http://{address}/v1" for address in view.http_addresses)
            self.say(f"OpenAI API at [bold]{urls}[/]")
        self.say('try: [bold]splitserve generate "The capital of France is"[/]')

    def show(self, view: ClusterView, throughput: Throughput) -> None:
        rows = _rows(view, throughput)
        if self._live is not None:
            self._live.update(cluster_table(rows, view.routers), refresh=True)
            return
        for row in rows:
            if self._seen.get(row.name) != row.state:
                self._seen[row.name] = row.state
                self.say(" ".join(filter(None, (row.name, row.state, row.address, row.note))))

    def show_log(self, error: MemberFailed) -> None:
        if error.log_tail:
            self._console.print(f"[dim]the end of {error.log_path}:[/]", highlight=False)
            self._console.print(error.log_tail.rstrip(), markup=False, highlight=False)
        typer.secho(f"error: {error.message}", fg="red", err=True)


def _rows(view: ClusterView, throughput: Throughput) -> list[Row]:
    """One row a process: the router's word on a worker once it has one, the controller's before."""
    seen = {worker.address: worker for router in view.routers for worker in router.workers}
    rows = []
    for member in view.members:
        note = f"restarted {member.num_restarts} times" if member.num_restarts else ""
        worker = seen.get(member.endpoint.address) if member.endpoint else None
        if worker is not None:
            rows.append(worker_row(member.name, worker, throughput.tokens_per_s(member.name), note))
            continue
        address = member.endpoint.address if member.endpoint else ""
        state, reason = member.phase.value, member.reason or note
        rows.append(Row(name=member.name, role=member.role, state=state, address=address, note=reason))
    return rows
