"""`splitserve prefill-worker`: one prefill worker process, started by hand or by the controller."""

from __future__ import annotations

from typing import Annotated

import typer

from ..core.config import ClusterConfig
from ..deploy.options import worker_options
from ..deploy.roles import role_keys
from .flags import config_flags
from .role import Host, Labels, MetricsPort, Port, ReadyFile, Threads, WorkerId, read_labels, run_role

KvAddress = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT",
        help="Where decode workers fetch KV, if that is not the address it listens on (a proxy, a mapped port).",
        show_default="the address it listens on",
    ),
]


@config_flags(role_keys("prefill"))
def command(
    config: ClusterConfig,
    host: Host = "",
    port: Port = 0,
    metrics_port: MetricsPort = 0,
    worker_id: WorkerId = "",
    label: Labels = None,
    kv_address: KvAddress = "",
    threads: Threads = None,
    ready_file: ReadyFile = None,
) -> None:
    """Run a prefill worker: it computes prompts and first tokens, and hands their KV to decode workers.

    It serves until SIGTERM or Ctrl-C, then drains and exits.

    $ splitserve prefill-worker --port 7001 --threads 1

    $ splitserve prefill-worker --config cluster.yaml --dtype bfloat16
    """
    from ..deploy.worker_process import serve  # imports torch: not for --help

    options = worker_options(
        config,
        "prefill",
        host=host or config.worker_host or "127.0.0.1",
        port=port,
        metrics_port=metrics_port,
        worker_id=worker_id,
        labels=read_labels(label or ()),
        num_threads=threads,
        kv_address=kv_address,
    )
    run_role("prefill worker", serve, options, ready_file)
