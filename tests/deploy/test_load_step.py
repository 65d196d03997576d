"""Load that steps up and down on real workers: each pool grows by its own load and shrinks again, and nothing fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from splitserve.client import AsyncClient
from splitserve.core.config import ClusterConfig
from splitserve.deploy.controller import Controller
from splitserve.deploy.members import ClusterView
from splitserve.deploy.scaler import replay_log
from splitserve.engine.testing import make_tiny_model

from .load import ANSWER, NUM_LAYERS, PROMPT, Load, LostConnections, scaled_config
from .nodes import Nodes, kinds_of, ray_nodes
from .stand_in_roles import endpoints, scaling_log, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

WAIT_S = 240.0  # for a pool to have changed its size, on a machine that is busy with other tests
KINDS = {"prefill": "H100", "decode": "H200"}


def sizes(view: ClusterView) -> dict[str, int]:
    return {pool.role: pool.wanted for pool in view.pools}


@asynccontextmanager
async def served(config: ClusterConfig, log_dir: Path) -> AsyncIterator[tuple[Controller, Load]]:
    """A cluster of real workers and its clients, of whose requests none fails; every decision is the same replayed."""
    controller = Controller(config, log_dir)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(controller.run())
        await controller.ready.wait()
        address = controller.view().router_addresses[0]
        async with AsyncClient(address, retry=LostConnections(max_attempts=20), timeout_s=600) as client:
            load = Load(client)
            yield controller, load
            assert load.num_done > 20
            assert sum(router.num_failed for router in controller.view().routers) == 0
        controller.stop()
        await running
    assert replay_log(scaling_log(log_dir), controller.config)[1] == []


def two_kinds(nodes: Nodes) -> dict[str, object]:
    """Nodes for two workers of each pool, and what makes each pool ask for its own."""
    for kind in KINDS.values():
        nodes.add(kind, num_cpus=2, num_gpus=2)
    return {f"{pool}__gpus": 1 for pool in KINDS} | {f"{pool}__accelerator_type": kind for pool, kind in KINDS.items()}


async def becomes(controller: Controller, wanted: dict[str, int]) -> ClusterView:
    return await until(controller, lambda view: sizes(view) == wanted and view.settled, WAIT_S)


@pytest.mark.verify
async def test_each_pool_follows_its_own_load_and_no_request_fails(tmp_path: Path) -> None:
    model = make_tiny_model("llama", tmp_path / "model", num_hidden_layers=NUM_LAYERS)
    with ray_nodes() as nodes:
        async with served(scaled_config(model, **two_kinds(nodes)), tmp_path / "logs") as (controller, load):
            async with load.of(PROMPT):
                view = await becomes(controller, {"prefill": 2, "decode": 1})
                assert kinds_of(view)["prefill-1"] == "H100"
            await becomes(controller, {"prefill": 1, "decode": 1})
            async with load.of(ANSWER):
                view = await becomes(controller, {"prefill": 1, "decode": 2})
                assert kinds_of(view)["decode-1"] == "H200"
            await becomes(controller, {"prefill": 1, "decode": 1})


async def test_a_load_step_of_half_a_minute(tmp_path: Path) -> None:
    """The one above in short: prompts, answers before that has died away, and then nothing."""
    model = make_tiny_model("llama", tmp_path / "model", num_hidden_layers=NUM_LAYERS)
    with ray_nodes() as nodes:
        config = scaled_config(model, **two_kinds(nodes))
        async with served(config, tmp_path / "logs") as (controller, load):
            async with load.of(PROMPT):
                await becomes(controller, {"prefill": 2, "decode": 1})
            async with load.of(ANSWER):
                await until(controller, lambda view: sizes(view)["decode"] == 2, WAIT_S)
            await becomes(controller, {"prefill": 1, "decode": 1})


@pytest.mark.verify
async def test_workers_change_their_role_with_the_load_and_no_request_fails(tmp_path: Path) -> None:
    """Three alike for both pools: prompts make two of them prefill workers, answers make two decode workers."""
    model = make_tiny_model("llama", tmp_path / "model", num_hidden_layers=NUM_LAYERS)
    with ray_nodes() as nodes:
        nodes.add(num_cpus=4)
        config = scaled_config(model, decode__replicas=2, scaling__max_gpus=3)
        async with served(config, tmp_path / "logs") as (controller, load):
            pids = {name: endpoint.pid for name, endpoint in endpoints(controller.view()).items()}
            async with load.of(PROMPT):
                await becomes(controller, {"prefill": 2, "decode": 1})
            async with load.of(ANSWER):
                view = await becomes(controller, {"prefill": 1, "decode": 2})
            assert {name: endpoint.pid for name, endpoint in endpoints(view).items()} == pids
            assert sorted(role for name, role in controller.roles.items()) == ["decode", "decode", "prefill", "router"]
