"""Does anything grow? Many short requests, some of them aborted, while memory and descriptors of each process are read.

python -m splitserve.benchmarks.soak --requests 40000 --aborts 0.1
"""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import grpc.aio
import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..client import AsyncClient
from ..core.config import load_config
from ..deploy.process import Endpoint
from ..engine.testing import make_tiny_model
from ..proto import worker_pb2
from ..proto.worker_pb2_grpc import WorkerAdminStub
from .processes import ProcessCluster, process_cluster
from .report import write_json

WARM_UP = 0.4  # of the requests: allocators, caches and bounded tables fill up
NUM_SAMPLES = 60
PROMPT_TOKENS = range(4, 40)  # any length: what is kept for each shape of a step must be bounded too
KIB_PER_1000 = 256.0  # resident memory may grow by this much with each 1,000 requests
FDS_PER_1000 = 0.5
_SETTLE_S = 60.0
# Lengths of prompts sent before anything is counted: whatever a CPU compiles for a number of tokens
# (`engine/cpu_linear.py`) is there then, also for a step of all prompts under way. By chance alone the last of it comes
# after many thousand requests, and takes 2 MiB.
_EVERY_FORM = (*range(1, 8), *range(8, 641, 8))


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """What a process held, sample by sample, and the slope of the line through the second part."""

    rss_kib: tuple[int, ...]
    num_fds: tuple[int, ...]
    rss_kib_per_1000: float
    fds_per_1000: float

    @property
    def is_flat(self) -> bool:
        return self.rss_kib_per_1000 <= KIB_PER_1000 and self.fds_per_1000 <= FDS_PER_1000


def slope_per_1000(num_requests: Sequence[int], values: Sequence[int]) -> float:
    """Of the least-squares line, over the samples after the warm-up."""
    first = int(len(values) * WARM_UP)
    x, y = np.asarray(num_requests[first:], dtype=float), np.asarray(values[first:], dtype=float)
    return float(np.polyfit(x, y, 1)[0] * 1000)


def main(
    requests: Annotated[int, typer.Option(min=100, help="Requests to send.")] = 40_000,
    aborts: Annotated[float, typer.Option(min=0, max=1, help="Share whose client goes away.")] = 0.1,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way.")] = 16,
    seed: Annotated[int, typer.Option(help="Of prompts and aborts.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every sample here.")] = None,
) -> None:
    """A split cluster of processes with a tiny random model. Exit code 1 if a process grows or a block stays behind.

    $ python -m splitserve.benchmarks.soak --requests 40000 --aborts 0.1
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    raise typer.Exit(0 if asyncio.run(_main(requests, aborts, concurrency, seed, json_file)) else 1)


async def _main(num_requests: int, aborts: float, concurrency: int, seed: int, json_file: Path | None) -> bool:
    console = Console()
    with tempfile.TemporaryDirectory() as directory:
        model = make_tiny_model("llama", Path(directory) / "model")
        sizes = {"engine.num_kv_blocks": 512, "engine.self_check": False}
        config = load_config(None, {"model": str(model), **sizes})
        async with process_cluster(config, Path(directory) / "logs") as cluster:
            began_s = time.monotonic()
            growth = await _load(cluster, num_requests, aborts, concurrency, seed, console)
            seconds = time.monotonic() - began_s
            held = {name: await _held(worker) for name, worker in cluster.workers.items()}
    table = Table(
        "process", "RSS MiB, first", "last", "KiB per 1,000", "descriptors, first", "last", "per 1,000", "flat"
    )
    for name, row in growth.items():
        ends = [f"{row.rss_kib[place] / 1024:.1f}" for place in (0, -1)]
        cells = (*ends, f"{row.rss_kib_per_1000:+.1f}", str(row.num_fds[0]), str(row.num_fds[-1]))
        table.add_row(name, *cells, f"{row.fds_per_1000:+.2f}", "yes" if row.is_flat else "[red]no")
    console.print(table)
    console.print(
        f"{num_requests} requests in {seconds:.0f} s; allowed: {KIB_PER_1000:g} KiB, {FDS_PER_1000:g} a 1,000"
    )
    for name, blocks in held.items():
        if blocks:
            console.print(f"[red]{name}: {blocks} blocks are neither free nor cached")
    if json_file is not None:
        rows = {name: asdict(row) for name, row in growth.items()}
        write_json(json_file, {"requests": num_requests, "aborts": aborts, "seed": seed, "held": held, "growth": rows})
    return all(row.is_flat for row in growth.values()) and not any(held.values())


async def _load(
    cluster: ProcessCluster, num_requests: int, aborts: float, concurrency: int, seed: int, console: Console
) -> dict[str, Growth]:
    processes: Mapping[str, Endpoint] = {"router-0": cluster.router, **cluster.workers}
    rss: dict[str, list[int]] = {name: [] for name in processes}
    fds: dict[str, list[int]] = {name: [] for name in processes}
    counts: list[int] = []
    rng = random.Random(seed)
    numbers = iter(range(num_requests))
    every = max(1, num_requests // NUM_SAMPLES)
    with Progress(console=console) as progress:
        bar = progress.add_task("requests", total=num_requests)
        async with AsyncClient(cluster.router.address) as client:
            for token_id, num_tokens in enumerate(_EVERY_FORM):  # none begins like another: nothing of it is cached
                await _one(client, [token_id] * num_tokens, None)

            async def send() -> None:
                for number in numbers:
                    prompt = [rng.randrange(256) for _ in range(rng.choice(PROMPT_TOKENS))]
                    leave_after = rng.randrange(3) if rng.random() < aborts else None
                    await _one(client, prompt, leave_after)
                    progress.advance(bar)
                    if number % every == 0:
                        counts.append(number)
                        for name, process in processes.items():
                            rss[name].append(_rss_kib(process.pid))
                            fds[name].append(len(os.listdir(f"/proc/{process.pid}/fd")))

            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(send())
    return {
        name: Growth(
            rss_kib=tuple(rss[name]),
            num_fds=tuple(fds[name]),
            rss_kib_per_1000=slope_per_1000(counts, rss[name]),
            fds_per_1000=slope_per_1000(counts, fds[name]),
        )
        for name in processes
    }


async def _one(client: AsyncClient, prompt: Sequence[int], leave_after: int | None) -> None:
    """Read the answer, or leave after so many chunks."""
    async with client.stream(prompt, max_tokens=4, ignore_eos=True) as stream:
        num_chunks = 0
        while leave_after is None or num_chunks < leave_after:
            if await anext(stream, None) is None:
                return
            num_chunks += 1


async def _held(worker: Endpoint) -> int:
    """Blocks neither free nor cached, once what was aborted had time to be freed."""
    deadline_s = time.monotonic() + _SETTLE_S
    async with grpc.aio.insecure_channel(worker.address) as channel:
        while True:
            answer = await WorkerAdminStub(channel).GetWorkerStatus(worker_pb2.GetWorkerStatusRequest(), timeout=10)
            status = answer.status
            held = status.num_blocks - status.num_free_blocks - status.num_cached_blocks
            if not held or time.monotonic() > deadline_s:
                return held
            await asyncio.sleep(0.1)


def _rss_kib(pid: int) -> int:
    rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(rows["VmRSS"].split()[0])


if __name__ == "__main__":
    typer.run(main)
