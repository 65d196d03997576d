"""A whole cluster for as long as a block of code runs: used by `splitserve up` and by the demo."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from ..core.config import WORKER_ROLES, ClusterConfig
from ..core.state import state_path
from .controller import Controller, first_error
from .ray_start import joined_ray, local_ray, running_ray
from .roles import role_needs

_ROOM_CPUS = 64


@contextmanager
def cluster_ray(config: ClusterConfig) -> Iterator[ClusterConfig]:
    """The Ray that `config` asks for: one to join, or one of our own. Yields the configuration with its address."""
    address, namespace = config.ray.address, config.ray.namespace
    if address == "auto":
        address = running_ray()
    config = config.model_copy(update={"ray": config.ray.model_copy(update={"address": address})})
    if address is not None:
        with joined_ray(address, namespace):
            yield config
        return
    num_cpus = sum(role_needs(config, role).num_cpus * config.replicas(role) for role in WORKER_ROLES)
    # Ray only counts them: on one's own machine `scale` may ask for more workers than there are cores.
    with local_ray(num_cpus + config.router.replicas + _ROOM_CPUS, namespace):
        yield config


@asynccontextmanager
async def running_cluster(config: ClusterConfig, log_dir: Path) -> AsyncIterator[Controller]:
    """Start a cluster and stop it at the end of the block; needs `cluster_ray`.

    The block begins at once: await `controller.ready`. It is cancelled when the cluster fails, and the failure raised.
    """
    controller = Controller(config, log_dir)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(controller.run())
            yield controller
            controller.stopping.set()  # not stop(): the block may end because of one, and a second means hurry
    except BaseExceptionGroup as failed:
        raise first_error(failed) from failed


def new_log_dir(config: ClusterConfig) -> Path:
    """Where this start's logs go: a directory of its own."""
    return (config.log_dir or state_path().parent / "logs") / time.strftime("%Y%m%d-%H%M%S")
