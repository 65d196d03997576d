"""The controller as a Ray actor: killed, it goes on with the processes that are there and with what was asked for."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
import ray
from ray import cloudpickle
from splitserve.core.config import ClusterConfig
from splitserve.core.errors import ConfigError
from splitserve.deploy.cluster_handle import ClusterHandle
from splitserve.deploy.members import ClusterView

from . import stand_in_roles
from .stand_in_roles import WAIT_S, config, endpoints, scaled_config, stand_in

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(400)]

cloudpickle.register_pickle_by_value(sys.modules[stand_in_roles.__name__])  # the actor cannot import tests


async def until(handle: ClusterHandle, condition: Callable[[ClusterView], bool]) -> ClusterView:
    async with asyncio.timeout(WAIT_S):
        while not condition(view := await handle.view()):
            assert await handle.outcome() is None
            await asyncio.sleep(0.1)
    return view


@asynccontextmanager
async def started(cluster: ClusterConfig, log_dir: Path) -> AsyncIterator[ClusterHandle]:
    handle = ClusterHandle.start(cluster, log_dir, command=stand_in)
    try:
        yield handle
    finally:
        await handle.stop()
        async with asyncio.timeout(WAIT_S):
            while await handle.outcome() is None:
                await asyncio.sleep(0.1)
        await handle.dismiss()


async def test_a_killed_controller_goes_on_with_what_is_there(tmp_path: Path) -> None:
    async with started(config(), tmp_path) as handle:
        await until(handle, lambda view: view.settled)
        await handle.scale({"prefill": 2})
        before = endpoints(await until(handle, lambda view: view.settled))
        with pytest.raises(ConfigError, match="prefill: got 0 workers, wanted: 1 to"):
            await handle.scale({"prefill": 0})
        beyond = config(scaling={"enabled": True, "max_gpus": 1}, prefill__max=3, decode__max=3)
        for change in (handle.preview, handle.apply):
            with pytest.raises(ConfigError, match="the GPU budget is 1 and the fewest workers of both pools hold 2"):
                await change(beyond)

        first = await handle.pid()
        os.kill(first, signal.SIGKILL)
        view = await until(handle, lambda view: view.settled)
        assert await handle.pid() != first
        assert endpoints(view) == before
        assert all(psutil.pid_exists(endpoint.pid) for endpoint in before.values())

        # It watches them as the one before did, and the router knows it again.
        os.kill(before["prefill-1"].pid, signal.SIGKILL)
        view = await until(
            handle, lambda view: endpoints(view).get("prefill-1", before["prefill-1"]) != before["prefill-1"]
        )
        await until(handle, lambda view: view.settled)
        log = [piece async for piece in handle.log("prefill-1", last_bytes=1000, follow=False)]
        assert b"prefill threads=1" in b"".join(log)
        log = [piece async for piece in handle.log("controller", last_bytes=10_000, follow=False)]
        assert b"goes on with decode-0, prefill-0, prefill-1, router-0" in b"".join(log)
    assert not ray.util.list_named_actors()
    assert not [endpoint for endpoint in before.values() if psutil.pid_exists(endpoint.pid)]


@pytest.mark.verify
async def test_a_killed_controller_knows_the_role_that_a_worker_changed_to(tmp_path: Path) -> None:
    cluster = scaled_config(tmp_path / "load", scaling={"max_gpus": 3}, decode__replicas=2)
    async with started(cluster, tmp_path / "logs") as handle:
        view = await until(handle, lambda view: view.settled and view.pools[0].ready == 2)
        before, roles = endpoints(view), {member.name: member.role for member in view.members}
        assert sorted(roles.values()) == ["decode", "prefill", "prefill", "router"]
        first = await handle.pid()
        os.kill(first, signal.SIGKILL)
        view = await until(handle, lambda view: view.settled)
        assert await handle.pid() != first
        assert {member.name: member.role for member in view.members} == roles
        assert endpoints(view) == before
