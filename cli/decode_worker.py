"""`splitserve decode-worker`: one decode or colocated worker process, started by hand or by the controller."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ..core.config import ClusterConfig
from ..deploy.options import worker_options
from ..deploy.roles import role_keys
from .flags import config_flags
from .role import Host, Labels, MetricsPort, Port, ReadyFile, Threads, WorkerId, read_labels, run_role


@config_flags(role_keys("decode"))
def command(
    config: ClusterConfig,
    role: Annotated[
        Literal["decode", "colocated"], typer.Option(help="decode fetches KV; colocated prefills by itself.")
    ] = "decode",
    host: Host = "",
    port: Port = 0,
    metrics_port: MetricsPort = 0,
    worker_id: WorkerId = "",
    label: Labels = None,
    threads: Threads = None,
    ready_file: ReadyFile = None,
) -> None:
    """Run a decode worker: it fetches prompts' KV from prefill workers and streams the answers' tokens.

    It serves until SIGTERM or Ctrl-C, then drains and exits.

    $ splitserve decode-worker --port 7002 --threads 1

    $ splitserve decode-worker --role colocated --kv-memory 2GiB
    """
    from ..deploy.worker_process import serve  # imports torch: not for --help

    options = worker_options(
        config,
        role,
        host=host or config.worker_host or "127.0.0.1",
        port=port,
        metrics_port=metrics_port,
        worker_id=worker_id,
        labels=read_labels(label or ()),
        num_threads=threads,
    )
    run_role(f"{role} worker", serve, options, ready_file)
