"""Load that steps up and down on real workers: each pool grows by its own load and shrinks again, and nothing fails."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import ray
from splitserve.client import AsyncClient, RetryPolicy
from splitserve.core.config import ClusterConfig, load_config
from splitserve.deploy.controller import Controller
from splitserve.deploy.members import ClusterView
from splitserve.deploy.scaler import replay_log
from splitserve.engine.testing import make_tiny_model

from .nodes import kinds_of, ray_nodes
from .stand_in_roles import scaling_log, until

pytestmark = [pytest.mark.cluster, pytest.mark.verify, pytest.mark.timeout(1200)]

WAIT_S = 240.0  # for a pool to have changed its size, on a machine that is busy with other tests

MAX_RUNNING = 2
NUM_LAYERS = 8  # slow enough that few requests are many
STEP = 1.3  # times what one worker carries


class Load:
    """Requests at a fixed rate, whatever becomes of those before; the client does not retry."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._numbers = itertools.count()
        self.num_done = 0

    async def one(self, num_prompt_tokens: int, max_tokens: int) -> float:
        """Seconds of its longer part, prefill or decode."""
        number = next(self._numbers)
        prompt = [5 + (number * 7 + index * 3) % 90 for index in range(num_prompt_tokens)]
        result = await self._client.generate(prompt, max_tokens=max_tokens, ignore_eos=True)
        assert len(result.token_ids) == max_tokens
        self.num_done += 1
        return max(result.timing.prefill_s, result.timing.decode_s)

    @asynccontextmanager
    async def at(self, rate: float, num_prompt_tokens: int, max_tokens: int) -> AsyncIterator[None]:
        """For as long as the block runs; every request must have been answered. Raises: whatever one failed with."""
        async with asyncio.TaskGroup() as group:

            async def arrive() -> None:
                while True:
                    group.create_task(self.one(num_prompt_tokens, max_tokens))
                    await asyncio.sleep(1 / rate)

            arriving = group.create_task(arrive())
            yield
            arriving.cancel()


def cluster_config(model: Path) -> ClusterConfig:
    return load_config(
        None,
        {
            "model": str(model),
            "router.port": 0,
            "router.http_port": -1,
            "router.max_queued": 8192,
            "startup_timeout_s": 240,
            "restart.unhealthy_s": 60,
            "ray.address": ray.get_runtime_context().gcs_address,
            "engine.device": "cpu",
            "engine.self_check": False,
            "engine.num_kv_blocks": 512,
            "engine.max_step_tokens": 16,
            "engine.max_running": MAX_RUNNING,
            "engine.prefix_cache": False,
            "scaling.enabled": True,
            "scaling.period_s": 0.5,
            "scaling.startup_s": 2,
            "scaling.cold_start_s": 0,
            "scaling.down_after_s": 4,
            "scaling.up_cooldown_s": 1,
            "scaling.down_cooldown_s": 1,
            "slo.ttft_s": 30,
            "slo.tpot_s": 10,
            **{
                f"{pool}.{key}": value
                for pool, kind in (("prefill", "H100"), ("decode", "H200"))
                for key, value in (("max", 2), ("threads", 1), ("gpus", 1), ("accelerator_type", kind))
            },
        },
    )


def sizes(view: ClusterView) -> dict[str, int]:
    return {pool.role: pool.wanted for pool in view.pools}


async def test_each_pool_follows_its_own_load_and_no_request_fails(tmp_path: Path) -> None:
    model = make_tiny_model("llama", tmp_path / "model", num_hidden_layers=NUM_LAYERS)
    with ray_nodes() as nodes:
        nodes.add("H100", num_cpus=2, num_gpus=2)
        nodes.add("H200", num_cpus=2, num_gpus=2)
        config = cluster_config(model)
        controller = Controller(config, tmp_path / "logs")
        async with asyncio.TaskGroup() as group:
            running = group.create_task(controller.run())
            await controller.ready.wait()
            address = controller.view().router_addresses[0]
            async with AsyncClient(address, retry=RetryPolicy(max_attempts=1), timeout_s=600) as client:
                load = Load(client)
                await load.one(200, 1)
                prefill_s = await load.one(200, 1)
                async with load.at(STEP / prefill_s, 200, 1):
                    view = await until(
                        controller, lambda view: sizes(view) == {"prefill": 2, "decode": 1} and view.settled, WAIT_S
                    )
                    assert kinds_of(view)["prefill-1"] == "H100"
                view = await until(
                    controller, lambda view: sizes(view) == {"prefill": 1, "decode": 1} and view.settled, WAIT_S
                )

                await load.one(16, 64)
                decode_s = await load.one(16, 64)
                async with load.at(STEP * MAX_RUNNING / decode_s, 16, 64):
                    view = await until(
                        controller, lambda view: sizes(view) == {"prefill": 1, "decode": 2} and view.settled, WAIT_S
                    )
                    assert kinds_of(view)["decode-1"] == "H200"
                view = await until(
                    controller, lambda view: sizes(view) == {"prefill": 1, "decode": 1} and view.settled, WAIT_S
                )
                assert load.num_done > 20
                assert sum(router.num_failed for router in view.routers) == 0
            controller.stop()
            await running
    assert replay_log(scaling_log(tmp_path / "logs"), controller.config)[1] == []
