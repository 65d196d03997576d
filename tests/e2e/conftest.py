"""Whole clusters for tests: every role in this process over real gRPC, or each in a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from splitserve.benchmarks.processes import ProcessCluster, process_cluster
from splitserve.client import AsyncClient, RetryPolicy
from splitserve.core.config import load_config
from splitserve.decode_worker.server import DecodeServer
from splitserve.engine.engine import Engine
from splitserve.engine.options import EngineOptions
from splitserve.engine.testing import make_tiny_model
from splitserve.prefill_worker.server import PrefillServer
from splitserve.proto.tls import Tls
from splitserve.router.server import Router, RouterOptions
from splitserve.worker.host import WorkerHost
from splitserve.worker.options import Role, WorkerOptions

WAIT_S = 30.0


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with a tokenizer."""
    path = tmp_path_factory.mktemp("models") / "llama"
    make_tiny_model("llama", path)
    return path


@dataclass
class Cluster:
    """Everything of a cluster in this process, and a client that does not retry."""

    router: Router
    workers: dict[str, PrefillServer | DecodeServer]
    client: AsyncClient
    metrics_addresses: dict[str, str] = field(default_factory=dict)

    def host(self, name: str) -> WorkerHost:
        return self.workers[name].worker.host

    @property
    def engines(self) -> list[Engine]:
        return [server.worker.host.engine for server in self.workers.values()]

    async def idle(self) -> None:
        """Wait until nothing is left of any request, then check that no block was lost."""
        async with asyncio.timeout(WAIT_S):
            while any(is_busy(engine) for engine in self.engines):
                await asyncio.sleep(0.005)
        for engine in self.engines:
            usage = engine.usage()
            assert usage.blocks_free + usage.blocks_cached == usage.blocks_total
            assert engine.num_orphaned_blocks() == 0
        assert self.router.dispatcher.num_live == self.router.dispatcher.waiting.num_queued == 0


def is_busy(engine: Engine) -> bool:
    usage = engine.usage()
    return usage.blocks_live + usage.blocks_granted + usage.num_waiting + usage.num_running > 0


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def served(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ProcessCluster]:
    """A split cluster of real processes that serves the tiny model to every test of the session."""
    config = load_config(None, {"model": str(tiny), "engine.num_kv_blocks": 1024, "engine.self_check": False})
    async with process_cluster(config, tmp_path_factory.mktemp("served")) as cluster:
        async with AsyncClient(cluster.router.address) as client:
            await client.generate([5], max_tokens=1)  # returns once the router has sessions with both workers
        yield cluster


StartCluster = Callable[..., Awaitable[Cluster]]


@pytest_asyncio.fixture
async def start_cluster(tiny: Path) -> AsyncIterator[StartCluster]:
    """start_cluster(prefill=1, decode=1, colocated=0, model=..., transports=..., router={...}, **engine options)."""
    async with AsyncExitStack() as stack:

        async def start(
            *,
            prefill: int = 1,
            decode: int = 1,
            colocated: int = 0,
            model: Path | str | None = None,
            transports: tuple[str, ...] = ("shared_memory", "grpc"),
            router: dict[str, Any] | None = None,
            decode_blocks: int | None = None,
            local_prefill: bool = False,
            tls: Callable[[str], Tls] | None = None,
            **engine: Any,
        ) -> Cluster:
            name = str(model or tiny)
            fields = {"num_kv_blocks": 512, "max_step_tokens": 64, "num_threads": 1, "self_check": False, **engine}
            workers: dict[str, PrefillServer | DecodeServer] = {}
            metrics_addresses: dict[str, str] = {}

            async def add(role: Role, number: int, **changes: Any) -> str:
                options = EngineOptions(model=name, dtype="float32", shared_pool=True, **{**fields, **changes})
                kind = PrefillServer if role == "prefill" else DecodeServer
                worker_id = f"{role}-{number}"
                server = kind(
                    WorkerOptions(
                        engine=options,
                        role=role,
                        worker_id=worker_id,
                        transports=transports,
                        local_prefill=local_prefill,
                        tls=tls("prefill" if role == "prefill" else "decode") if tls is not None else None,
                    )
                )
                stack.push_async_callback(server.worker.stop)
                workers[worker_id] = server
                ready = await server.worker.host.start()
                metrics_addresses[worker_id] = ready.metrics_address
                return ready.address

            blocks = {"num_kv_blocks": decode_blocks} if decode_blocks is not None else {}
            prefills = [await add("prefill", number) for number in range(prefill)]
            decodes = [await add("decode", number, **blocks) for number in range(decode)]
            decodes += [await add("colocated", number, **blocks) for number in range(colocated)]
            changes = {"tls": tls("router") if tls is not None else None, **(router or {})}
            options = RouterOptions(model=name, prefill=tuple(prefills), decode=tuple(decodes), port=0, **changes)
            server = Router(options)
            stack.push_async_callback(server.stop)
            address = (await server.start()).address
            own = tls("operator") if tls is not None else None
            client = await stack.enter_async_context(AsyncClient(address, retry=RetryPolicy(max_attempts=1), tls=own))
            return Cluster(server, workers, client, metrics_addresses)

        yield start
