"""`splitserve router`: one router process, started by hand or by the controller."""

from __future__ import annotations

from typing import Annotated

import typer

from ..core.config import ClusterConfig
from ..deploy.options import router_options
from ..deploy.roles import role_keys
from .flags import config_flags
from .role import MetricsPort, ReadyFile, run_role


@config_flags(role_keys("router"))
def command(
    config: ClusterConfig,
    prefill: Annotated[list[str] | None, typer.Option(help="HOST:PORT of a prefill worker; repeatable.")] = None,
    decode: Annotated[
        list[str] | None, typer.Option(help="HOST:PORT of a decode or colocated worker; repeatable.")
    ] = None,
    metrics_port: MetricsPort = 0,
    router_id: Annotated[str, typer.Option(help="Name, unique in the cluster.", show_default="router")] = "",
    ready_file: ReadyFile = None,
) -> None:
    """Run a router: clients talk to it, and it sends each request through a prefill and a decode worker.

    It serves until SIGTERM or Ctrl-C, then gives live requests some time and exits.

    $ splitserve router --port 50051 --http-port 8000 --prefill 127.0.0.1:7001 --decode 127.0.0.1:7002
    """
    from ..router.server import serve

    options = router_options(
        config,
        prefill=tuple(prefill or ()),
        decode=tuple(decode or ()),
        metrics_port=metrics_port,
        router_id=router_id,
    )
    run_role("router", serve, options, ready_file)
