"""Commands of the light processes that stand in for the roles, and what tests ask of a controller of them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from splitserve.core.config import ClusterConfig, Role, load_config
from splitserve.deploy.controller import Controller
from splitserve.deploy.members import ClusterView
from splitserve.deploy.process import Endpoint

STAND_IN = str(Path(__file__).with_name("stand_in.py"))
WAIT_S = 150.0


def stand_in(
    config: ClusterConfig,
    role: Role,
    *,
    name: str,
    host: str,
    port: int,
    num_threads: int,
    http_port: int,
    on_cpu: bool = False,
) -> Sequence[str]:
    """`model` names the process that must fail, and how, "decode-0:typed"; or the file that routers' load lasts for,
    "load:FILE".
    """
    failing, _, how = config.model.partition(":")
    return [
        *(sys.executable, STAND_IN, role, "--host", host, "--port", str(port)),
        *(("--fail", how) if name == failing else ()),
        *(("--load-file", how) if failing == "load" and role == "router" else ()),
    ]


def config(**overrides: Any) -> ClusterConfig:
    base = {"router.port": 0, "drain_timeout_s": 5.0, "restart.backoff_s": 0.0, "startup_timeout_s": 150.0}
    base |= {f"{pool}.threads": 1 for pool in ("prefill", "decode")}
    return load_config(None, base | {key.replace("__", "."): value for key, value in overrides.items()})


def scaled_config(load: Path, *, scaling: Mapping[str, object], **overrides: Any) -> ClusterConfig:
    """Prompts come, at twice what one worker computes, for as long as the file exists."""
    load.touch()
    quick = {
        "enabled": True,
        "period_s": 0.5,
        "startup_s": 1.0,
        "cold_start_s": 0.0,
        "down_after_s": 2.0,
        "up_cooldown_s": 0.0,
        "down_cooldown_s": 0.0,
    }
    pools = {"prefill__max": 3, "decode__max": 3}
    return config(model=f"load:{load}", scaling=quick | dict(scaling), **{**pools, **overrides})


async def until(
    controller: Controller, condition: Callable[[ClusterView], bool], wait_s: float = WAIT_S
) -> ClusterView:
    async with asyncio.timeout(wait_s):
        while not condition(controller.view()):
            await asyncio.sleep(0.02)
    return controller.view()


@asynccontextmanager
async def running(cluster: ClusterConfig, log_dir: Path) -> AsyncIterator[Controller]:
    controller = Controller(cluster, log_dir, command=stand_in)
    run = asyncio.create_task(controller.run())
    ready = asyncio.create_task(controller.ready.wait())
    await asyncio.wait({run, ready}, return_when=asyncio.FIRST_COMPLETED)
    try:
        if run.done():
            await run
        yield controller
    finally:
        ready.cancel()
        controller.stop()
        await run


def endpoints(view: ClusterView) -> dict[str, Endpoint]:
    return {member.name: member.endpoint for member in view.members if member.endpoint}


def workers_of(view: ClusterView) -> set[str]:
    return {worker.address for router in view.routers for worker in router.workers}


def scaling_log(log_dir: Path) -> Path:
    """The one that a controller wrote there."""
    (log,) = log_dir.glob("scaling-*.jsonl")
    return log
