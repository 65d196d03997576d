"""Load on a cluster of real workers, and a cluster that follows it within seconds."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import ray
from splitserve.client import AsyncClient, RetryPolicy
from splitserve.core.config import ClusterConfig, load_config
from splitserve.core.errors import SplitserveError, Unavailable

MAX_RUNNING = 2
NUM_LAYERS = 8  # slow enough that few requests are many
NUM_CLIENTS = 32
PROMPT = (200, 1)  # tokens in and out of a request that is all prefill
ANSWER = (16, 64)  # and of one that is nearly all decode


class LostConnections(RetryPolicy):
    """A router that is starved of CPU takes its clients for dead within 2 s; nothing else is tried again."""

    def delay_s(self, attempt: int, error: SplitserveError) -> float | None:
        is_lost = isinstance(error, Unavailable) and error.retry_after_s is None
        return super().delay_s(attempt, error) if is_lost else None


class Load:
    """Requests one after another from many clients at once: too many for one worker, however fast the machine is."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._numbers = itertools.count()
        self.num_done = 0

    @asynccontextmanager
    async def of(self, shape: tuple[int, int]) -> AsyncIterator[None]:
        """For as long as the block runs; every request must have been answered. Raises: whatever one failed with."""
        ended = asyncio.Event()

        async def ask() -> None:
            while not ended.is_set():
                await self._one(*shape)

        async with asyncio.TaskGroup() as group:
            for _ in range(NUM_CLIENTS):
                group.create_task(ask())
            yield
            ended.set()

    async def _one(self, num_prompt_tokens: int, max_tokens: int) -> None:
        number = next(self._numbers)
        prompt = [5 + (number * 7 + index * 3) % 90 for index in range(num_prompt_tokens)]
        result = await self._client.generate(prompt, max_tokens=max_tokens, ignore_eos=True)
        assert len(result.token_ids) == max_tokens
        self.num_done += 1


def scaled_config(model: Path, **overrides: object) -> ClusterConfig:
    """One worker of each role, two at most, that follow the load within seconds."""
    return load_config(
        None,
        {
            "model": str(model),
            "router.port": 0,
            "router.http_port": -1,
            # As for the client: a worker that a busy machine starves is not at fault.
            "router.max_attempts": 20,
            "router.max_worker_deaths": 20,
            "router.no_worker_wait_s": 120,
            "startup_timeout_s": 240,
            "drain_timeout_s": 60,
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
            **{f"{pool}.{key}": value for pool in ("prefill", "decode") for key, value in (("max", 2), ("threads", 1))},
            **{key.replace("__", "."): value for key, value in overrides.items()},
        },
    )
