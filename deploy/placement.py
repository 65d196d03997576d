"""Where processes run: one Ray placement group and one actor for each, and the Ray that holds them."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..core.errors import ConfigError, Unavailable
from .process import Endpoint, Exit, RoleProcess, StartFailure
from .ray_directory import ray_directory
from .roles import Needs

_POLL_S = 0.1  # Ray tells the state of a placement group only when asked
_INFEASIBLE_S = 3.0  # a node that is just joining may still make it feasible
_OBJECT_STORE_BYTES = 80 << 20  # nothing of ours goes through it; Ray's least is 75 MiB


class ProcessActor:
    """Ray's hand on one node: starts, watches and stops one process. No token and no KV byte passes here.

    The process dies with the actor, and the actor's death is how the controller learns of a lost node.
    """

    def __init__(self, log_path: str) -> None:
        self._process = RoleProcess(Path(log_path))

    async def start(
        self, command: Sequence[str], environment: Mapping[str, str], timeout_s: float
    ) -> Endpoint | StartFailure:
        """Idempotent: a process that already serves is left alone."""
        node_ip: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        filled = [part.replace("{node_ip}", node_ip) for part in command]
        return await self._process.start(filled, environment, timeout_s)

    async def endpoint(self) -> Endpoint | None:
        """None unless the process serves."""
        return self._process.endpoint

    async def wait(self) -> Exit:
        """Returns when the process has ended."""
        return await self._process.wait()

    async def stop(self, grace_s: float) -> None:
        """Drain for at most `grace_s`, then kill."""
        await self._process.stop(grace_s)


async def place(name: str, needs: Needs, *, timeout_s: float) -> PlacementGroup:
    """A placement group for one process, once its resources are held; after a restart, the one it had.

    Raises: ConfigError: no node has what it needs. Unavailable: nodes have it, but others hold it.
    """
    group = find_group(name) or placement_group(
        [needs.bundle()],
        strategy="STRICT_PACK",
        name=name,
        bundle_label_selector=[dict(needs.labels)] if needs.labels else None,
    )
    started = time.monotonic()
    feasible = started
    while True:
        row = await asyncio.to_thread(placement_group_table, group)
        if row["state"] == "CREATED":
            return group
        now = time.monotonic()
        if row["stats"]["scheduling_state"] != "INFEASIBLE":
            feasible = now
        elif now - feasible > _INFEASIBLE_S:
            remove_placement_group(group)
            raise ConfigError(f"no node has what {name} needs ({needs}); {_nodes()}. Add such a node, or ask for less")
        if now - started > timeout_s:
            remove_placement_group(group)
            raise Unavailable(f"{name} waited {timeout_s:g} s for {needs}, which others hold; {_nodes()}")
        await asyncio.sleep(_POLL_S)


def find_group(name: str) -> PlacementGroup | None:
    """The placement group of this name in our namespace."""
    try:
        group: PlacementGroup = ray.util.get_placement_group(name)
    except ValueError:
        return None
    return group


def create_actor(name: str, group: PlacementGroup, needs: Needs, *, log_path: Path) -> Any:
    """The actor of this name in the placement group; it lives as long as this handle does."""
    return (
        ray.remote(ProcessActor)
        .options(
            name=name,
            get_if_exists=True,  # the name of one that just died may not be free yet: using it fails, and is retried
            num_cpus=needs.num_cpus,
            num_gpus=needs.num_gpus,
            max_restarts=0,  # the controller decides about restarts
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=group),
        )
        .remote(str(log_path))
    )


def _nodes() -> str:
    """The living nodes and what they have, for error messages."""
    rows = []
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"]:
            resources = ", ".join(f"{node['Resources'].get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
            labels = {k: v for k, v in node.get("Labels", {}).items() if not k.startswith("ray.io/node")}
            rows.append(f"{node['NodeManagerAddress']} has {resources}" + (f" and labels {labels}" if labels else ""))
    return "; ".join(rows) or "there is no living node"


@contextmanager
def local_ray(num_cpus: int, namespace: str) -> Iterator[None]:
    """A Ray of our own on this machine, that leaves nothing behind.

    Call `prepare_ray_environment` before anything imports Ray, and this on the main thread: the kernel ends Ray's
    processes together with the thread that started them.
    """
    with ray_directory() as directory:
        try:
            ray.init(
                address="local",  # not the cluster that RAY_ADDRESS may name
                namespace=namespace,
                num_cpus=max(num_cpus, os.cpu_count() or 1),
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                _temp_dir=str(directory),
            )
            yield
        finally:
            ray.shutdown()


@contextmanager
def joined_ray(address: str, namespace: str) -> Iterator[None]:
    """A connection to a Ray that others run. Raises: ConfigError: nobody answers there."""
    try:
        ray.init(address=address, namespace=namespace, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"cannot join the Ray cluster at {address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()
