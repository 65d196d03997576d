"""What every answer must be: each case asked of one undisturbed worker that prefills and decodes by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from ...client import AsyncClient, GenerationResult
from ...decode_worker.server import DecodeServer
from ...engine.options import EngineOptions
from ...router.server import Router, RouterOptions
from ...worker.options import WorkerOptions
from .plan import Case


async def reference_answers(model: Path, cases: Sequence[Case]) -> list[GenerationResult]:
    """In the order of the cases; router and worker run in this process and are gone when it returns."""
    engine = EngineOptions(model=str(model), dtype="float32", num_threads=1, num_kv_blocks=2048, self_check=False)
    server = DecodeServer(WorkerOptions(engine=engine, role="colocated"))
    try:
        worker = await server.worker.host.start()
        router = Router(RouterOptions(model=str(model), decode=(worker.address,), port=0))
        try:
            address = (await router.start()).address
            async with AsyncClient(address) as client:
                return await asyncio.gather(*(client.generate(case.prompt, **case.options) for case in cases))
        finally:
            await router.stop()
    finally:
        await server.worker.stop()
