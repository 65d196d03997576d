"""The way from a command to the controller of the cluster that runs: through the state file and Ray."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.config import ClusterConfig
from ..core.errors import ConfigError, Unavailable
from ..core.state import ClusterState, read_state, write_state
from ..deploy.claim import local_cluster_pid
from ..deploy.ray_environment import NoRay, prepare_ray_environment

if TYPE_CHECKING:  # Ray must not be imported before its environment is prepared
    from ..deploy.cluster_handle import ClusterHandle
    from ..deploy.members import ClusterView

RayAddress = Annotated[
    str | None,
    typer.Option(
        help="Ray that holds the cluster, as HOST:PORT; run this on one of its nodes.",
        show_default="that of the cluster which `up` started here",
    ),
]
Namespace = Annotated[str, typer.Option(help="Ray namespace of the cluster; with --ray-address.")]


class NoCluster(Unavailable):
    """Ray answers, and holds none."""


def running_state() -> ClusterState | None:
    """The cluster that `up` started here, if it still runs as far as can be told without asking Ray."""
    state = read_state()
    if state is None or not state.ray_address:
        return None
    return state if state.pid == 0 or state.pid == local_cluster_pid() else None


@contextmanager
def attached(ray_address: str | None = None, namespace: str = "splitserve") -> Iterator[ClusterHandle]:
    """Raises: ConfigError: there is no cluster. NoRay, NoCluster: it is gone, or seems to be."""
    token, by_file = "", ray_address is None
    if ray_address is None:
        state = running_state()
        if state is None:
            raise ConfigError("no cluster is running here; start one with `splitserve up`, or name its --ray-address")
        ray_address, namespace, token = state.ray_address, state.namespace, state.ray_token
    prepare_ray_environment(ray_address, token)
    from ..deploy.cluster_handle import ClusterHandle
    from ..deploy.ray_start import joined_ray

    with ExitStack() as stack:
        try:
            stack.enter_context(joined_ray(ray_address, namespace))
        except NoRay as error:
            hint = "; if that Ray is gone for good, `splitserve down --force` forgets the cluster" if by_file else ""
            raise NoRay(error.message + hint) from error
        handle = ClusterHandle.find()
        if handle is None:
            hint = "; `splitserve down` forgets it" if by_file else ""
            raise NoCluster(f"Ray at {ray_address} holds no cluster in namespace {namespace!r}{hint}")
        yield handle


def run(work: Callable[[ClusterHandle], Awaitable[None]], ray_address: str | None, namespace: str) -> None:
    """Do something with the controller."""

    async def main(handle: ClusterHandle) -> None:
        await work(handle)

    with attached(ray_address, namespace) as handle:
        asyncio.run(main(handle))


def cluster_state(config: ClusterConfig, view: ClusterView, log_dir: Path, *, leave: bool) -> ClusterState:
    """What other commands must know; `leave`: the cluster goes on without this process."""
    import ray

    own = config.ray.address is None
    return ClusterState(
        router_addresses=view.router_addresses,
        namespace=config.ray.namespace,
        pid=0 if leave else os.getpid(),
        metrics_addresses=tuple(m.endpoint.metrics_address for m in view.members if m.endpoint),
        http_addresses=view.http_addresses,
        ray_address=ray.get_runtime_context().gcs_address,
        ray_token=os.environ.get("RAY_AUTH_TOKEN", "") if own else "",
        log_dir=str(log_dir),
    )


def remember_routers(view: ClusterView) -> None:
    """Note where the routers are now, unless the process that holds the cluster does so."""
    from dataclasses import replace

    state = running_state()
    if state is not None and state.pid == 0:
        write_state(replace(state, router_addresses=view.router_addresses, http_addresses=view.http_addresses))
