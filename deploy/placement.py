"""Where processes run: one Ray placement group and one actor for each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..core.errors import ConfigError, Unavailable
from .log_reader import read_log
from .process import Endpoint, Exit, RoleProcess, StartFailure
from .roles import Needs

_EVERYWHERE = ("0.0.0.0", "[::]", "::")  # no address to call
_POLL_S = 0.1  # Ray tells the state of a placement group only when asked
_TELL_S = 2.0  # of waiting, before it is told
_PREFERENCE_S = 2.0  # for a preferred node; after it, any node that has what is needed


class ProcessActor:
    """Ray's hand on one node: starts, watches and stops one process. No token and no KV byte passes here.

    The process dies with the actor, and the actor's death is how the controller learns of a lost node.
    """

    def __init__(self, log_path: str) -> None:
        self._log_path = Path(log_path)
        self._process = RoleProcess(self._log_path)
        self._endpoint: Endpoint | None = None

    async def start(
        self, command: Sequence[str], environment: Mapping[str, str], timeout_s: float, digest: str
    ) -> Endpoint | StartFailure:
        """Idempotent: a process that already serves is left alone; its endpoint names what it was started with."""
        if self._endpoint is not None and self._process.endpoint is not None:
            return self._endpoint
        node_ip: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        filled = [part.replace("{node_ip}", node_ip) for part in command]
        started = await self._process.start(filled, environment, timeout_s)
        if isinstance(started, Endpoint):
            node_id = ray.get_runtime_context().get_node_id()
            host, _, port = started.address.rpartition(":")
            address = f"{node_ip}:{port}" if host in _EVERYWHERE else started.address
            started = self._endpoint = replace(started, address=address, node=node_id, launch=digest)
        return started

    async def took_role(self, boot_id: str, digest: str) -> None:
        """The process changed its role: from now on it is as if it had been started with it."""
        if self._endpoint is not None:
            self._endpoint = replace(self._endpoint, boot_id=boot_id, launch=digest)

    async def wait(self) -> Exit:
        """Returns when the process has ended."""
        return await self._process.wait()

    async def stop(self, grace_s: float) -> None:
        """Drain for at most `grace_s`, then kill."""
        await self._process.stop(grace_s)

    async def log(self, offset: int, max_bytes: int, wait_s: float) -> tuple[int, bytes]:
        """See read_log."""
        return await read_log(self._log_path, offset, max_bytes, wait_s)


async def place(
    name: str,
    needs: Needs,
    *,
    timeout_s: float,
    nodes_timeout_s: float,
    waits: Callable[[str], None],
    wish: str = "",
) -> PlacementGroup:
    """A placement group for one process, once its resources are held; after a restart, the one it had.

    Args:
        timeout_s: how long to wait for resources that others hold.
        nodes_timeout_s: how long to wait for a node that has them at all.
        waits: told what it waits for, if it does not get it soon.
        wish: which nodes to try first, for a moment: a label selector over node ids.

    Raises: ConfigError: no node has what it needs. Unavailable: nodes have it, but others hold it.
    """
    group = await asyncio.to_thread(find_group, name)
    if group is None and wish:
        group = await asyncio.to_thread(_reserve, name, needs, {"ray.io/node-id": wish})
        try:
            return await _reserved(name, needs, group, _PREFERENCE_S, _PREFERENCE_S, lambda _: None)
        except (ConfigError, Unavailable):
            group = None
    if group is None:
        group = await asyncio.to_thread(_reserve, name, needs, {})
    return await _reserved(name, needs, group, timeout_s, nodes_timeout_s, waits)


def _reserve(name: str, needs: Needs, labels: Mapping[str, str]) -> PlacementGroup:
    selector = {**needs.labels, **labels}
    group: PlacementGroup = placement_group(
        [needs.bundle()],
        strategy="STRICT_PACK",
        name=name,
        lifetime="detached",  # it outlives the controller, whose next incarnation finds it by its name
        bundle_label_selector=[selector] if selector else None,
    )
    return group


async def _reserved(
    name: str,
    needs: Needs,
    group: PlacementGroup,
    timeout_s: float,
    nodes_timeout_s: float,
    waits: Callable[[str], None],
) -> PlacementGroup:
    """The group, as soon as its resources are held; removed if they never will be."""
    started = time.monotonic()
    feasible = started
    told = False
    while True:
        row = await asyncio.to_thread(placement_group_table, group)
        if row["state"] == "CREATED":
            return group
        now = time.monotonic()
        if row["stats"]["scheduling_state"] != "INFEASIBLE":
            feasible = now
        elif now - feasible > nodes_timeout_s:
            await asyncio.to_thread(remove_placement_group, group)
            missing = await asyncio.to_thread(missing_from, needs)
            raise ConfigError(f"no node has what {name} needs ({needs}): {missing}. Add such a node, or ask for less")
        if now - started > timeout_s:
            await asyncio.to_thread(remove_placement_group, group)
            missing = await asyncio.to_thread(missing_from, needs)
            raise Unavailable(f"{name} waited {timeout_s:g} s for {needs}, which others hold: {missing}")
        if not told and now - started > _TELL_S:
            told = True
            waits(f"waits for {needs}: {await asyncio.to_thread(missing_from, needs)}")
        await asyncio.sleep(_POLL_S)


def remove_group(name: str) -> None:
    """Give back what the process of this name has reserved; fine if that is nothing."""
    group = find_group(name)
    if group is not None:
        remove_placement_group(group)


def find_group(name: str) -> PlacementGroup | None:
    """The placement group of this name in our namespace, unless it is being removed."""
    try:
        group: PlacementGroup = ray.util.get_placement_group(name)
    except ValueError:
        return None
    return group if placement_group_table(group)["state"] != "REMOVED" else None


def create_actor(name: str, group: PlacementGroup, needs: Needs, *, log_path: Path) -> Any:
    """The actor of this name in the placement group, made if there is none; it outlives the controller."""
    return (
        ray.remote(ProcessActor)
        .options(
            name=name,
            lifetime="detached",
            get_if_exists=True,  # the name of one that just died may not be free yet: using it fails, and is retried
            num_cpus=needs.num_cpus,
            num_gpus=needs.num_gpus,
            resources=dict(needs.resources),
            max_restarts=0,  # the controller decides about restarts
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=group),
        )
        .remote(str(log_path))
    )


def nodes_with(needs: Needs) -> Sequence[str]:
    """Ids of the living nodes that have what is needed, in use or not."""
    return [node["NodeID"] for node in _living_nodes() if not _lacks(node, needs)]


def missing_from(needs: Needs) -> str:
    """What each living node lacks, for error messages."""
    return "; ".join(explain_node(node, needs) for node in _living_nodes()) or "there is no living node"


def explain_node(node: Mapping[str, Any], needs: Needs) -> str:
    """One row of `ray.nodes()` against what is needed."""
    lacks = _lacks(node, needs)
    return f"{node['NodeManagerAddress']} " + (f"has {', '.join(lacks)}" if lacks else "has all of it, in use")


def _living_nodes() -> Sequence[Mapping[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _lacks(node: Mapping[str, Any], needs: Needs) -> Sequence[str]:
    lacks = [
        f"{node['Resources'].get(kind, 0):g} of {amount:g} {kind}"
        for kind, amount in needs.bundle().items()
        if node["Resources"].get(kind, 0) < amount
    ]
    labels = node.get("Labels", {})
    for key, wanted in needs.labels.items():
        if not label_matches(wanted, labels.get(key)):
            lacks.append(f"label {key}={labels[key]}, not {wanted}" if key in labels else f"no label {key}")
    return lacks


def label_matches(wanted: str, value: str | None) -> bool:
    """Whether a node's label meets a selector: x, !x, in(x,y) or !in(x,y)."""
    negated = wanted.startswith("!")
    text = wanted.removeprefix("!")
    values = text[3:-1].split(",") if text.startswith("in(") and text.endswith(")") else [text]
    return (value in [part.strip() for part in values]) != negated
