"""Does splitting change anything but speed? The same requests through a split and a colocated cluster on one machine.

python -m splitserve.benchmarks.split --requests 200
"""

from __future__ import annotations

import asyncio
import random
import re
import statistics
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import grpc.aio
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..client import AsyncClient, GenerationResult
from ..core.config import ClusterConfig, load_config
from ..proto import worker_pb2, worker_pb2_grpc
from .processes import ProcessCluster, process_cluster
from .report import write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One cluster's answers, in the order of the prompts, and its counters afterwards."""

    results: list[GenerationResult]
    seconds: float
    recomputed_prompt_tokens: float
    moved_bytes: float
    orphaned_blocks: float


def main(
    model: Annotated[str, typer.Option(help="Model to serve.")] = "smollm2-135m",
    requests: Annotated[int, typer.Option(min=1, help="Requests to each cluster.")] = 200,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 8,
    transport: Annotated[str, typer.Option(help="auto, grpc or shared-memory.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
) -> None:
    """Exit code 1 if a token differs, a byte is missing or a prompt token was computed twice."""
    raise typer.Exit(asyncio.run(_main(model, requests, concurrency, transport, seed, json_file)))


async def _main(model: str, requests: int, concurrency: int, transport: str, seed: int, json_file: Path | None) -> int:
    rng = random.Random(seed)
    prompts = [[rng.randrange(100, 4_000) for _ in range(rng.randrange(1, 200))] for _ in range(requests)]
    common = {"model": model, "transport": transport, "engine.dtype": "float32", "engine.prefix_cache": False}
    # The same two cores: two workers of one thread, or one worker of two.
    split_config = load_config(None, common)
    mono_config = load_config(None, {**common, "colocated.replicas": 1})
    split, bytes_per_token = await _serve(split_config, prompts, concurrency, threads=1, name="split")
    mono, _ = await _serve(mono_config, prompts, concurrency, threads=2, name="colocated")

    differing = sum(a.token_ids != b.token_ids for a, b in zip(split.results, mono.results, strict=True))
    expected_bytes = bytes_per_token * sum(len(prompt) for prompt in prompts)
    table = Table(title=f"{requests} requests, {concurrency} in flight, float32 greedy, transport {transport}")
    for column in ("", "split 1P1D", "colocated"):
        table.add_column(column, justify="left" if not column else "right")
    for name, split_value, mono_value in (
        ("TTFT p50 / p99 ms", *(_percentiles(_ttfts(s.results)) for s in (split, mono))),
        ("token gap p50 / p99 ms", *(_percentiles(_gaps(s.results)) for s in (split, mono))),
        ("output tokens/s", *(f"{sum(len(r.token_ids) for r in s.results) / s.seconds:.0f}" for s in (split, mono))),
        ("KV bytes moved", f"{split.moved_bytes:,.0f}", f"{mono.moved_bytes:,.0f}"),
        ("KV bytes by the layout's formula", f"{expected_bytes:,}", "0"),
        ("recomputed prompt tokens", f"{split.recomputed_prompt_tokens:.0f}", f"{mono.recomputed_prompt_tokens:.0f}"),
        ("orphaned blocks", f"{split.orphaned_blocks:.0f}", f"{mono.orphaned_blocks:.0f}"),
        ("requests whose tokens differ", str(differing), ""),
    ):
        table.add_row(name, split_value, mono_value)
    Console().print(table)
    good = (
        differing == 0
        and split.moved_bytes == expected_bytes
        and split.recomputed_prompt_tokens == 0
        and split.orphaned_blocks == mono.orphaned_blocks == 0
    )
    if json_file is not None:
        figures = {
            "seed": seed,
            "n": requests,
            "differing": differing,
            "moved_bytes": split.moved_bytes,
            "expected_bytes": expected_bytes,
            "recomputed_prompt_tokens": split.recomputed_prompt_tokens,
            "split": {"ttft_s": _ttfts(split.results), "itl_s": _gaps(split.results)},
            "colocated": {"ttft_s": _ttfts(mono.results), "itl_s": _gaps(mono.results)},
        }
        write_json(json_file, figures)
    return 0 if good else 1


async def _serve(
    config: ClusterConfig, prompts: list[list[int]], concurrency: int, *, threads: int, name: str
) -> tuple[Served, int]:
    with tempfile.TemporaryDirectory() as logs, Progress() as progress:
        task = progress.add_task(name, total=len(prompts))
        async with (
            process_cluster(config, Path(logs), num_threads=threads) as cluster,
            AsyncClient(cluster.router.address) as client,
        ):
            in_flight = asyncio.Semaphore(concurrency)

            async def one(prompt: list[int]) -> GenerationResult:
                async with in_flight:
                    result = await client.generate(prompt, max_tokens=32, ignore_eos=True)
                    progress.advance(task)
                    return result

            began_s = time.perf_counter()
            results = await asyncio.gather(*(one(prompt) for prompt in prompts))
            seconds = time.perf_counter() - began_s
            served = Served(
                results=results,
                seconds=seconds,
                recomputed_prompt_tokens=_metric(cluster, r"splitserve_\w+_recomputed_prompt_tokens_total"),
                moved_bytes=sum(r.timing.kv_bytes for r in results),
                orphaned_blocks=_metric(cluster, r"splitserve_kv_blocks_orphaned"),
            )
            worker = next(iter(cluster.workers.values()))
            async with grpc.aio.insecure_channel(worker.address) as channel:
                stub = worker_pb2_grpc.WorkerAdminStub(channel)
                told = await stub.GetWorkerStatus(worker_pb2.GetWorkerStatusRequest(), timeout=10)
    return served, told.info.kv_bytes_per_token


def _metric(cluster: ProcessCluster, name: str) -> float:
    """Sum of a metric over all workers."""
    total = 0.0
    for worker in cluster.workers.values():
        with urllib.request.urlopen(f"http://{worker.metrics_address}/metrics", timeout=10) as page:
            text = page.read().decode()
        found = re.findall(rf"^{name}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
        assert found, f"no metric {name}"
        total += sum(map(float, found))
    return total


def _ttfts(results: list[GenerationResult]) -> list[float]:
    return [r.ttft_s for r in results if r.ttft_s is not None]


def _gaps(results: list[GenerationResult]) -> list[float]:
    """Every single gap between consecutive tokens (ITL), seconds."""
    return [gap for r in results for gap in r.itl_s]


def _percentiles(seconds: list[float]) -> str:
    cuts = statistics.quantiles(seconds, n=100)
    return f"{1e3 * cuts[49]:.1f} / {1e3 * cuts[98]:.1f}"


if __name__ == "__main__":
    typer.run(main)
