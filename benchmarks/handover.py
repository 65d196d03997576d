"""What do router and hand-over add to TTFT? Idle cluster against a bare engine call, prompt by prompt in one run.

python -m splitserve.benchmarks.handover --prompts 40
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..client import AsyncClient
from ..core.config import load_config
from ..core.request import Request
from ..engine.engine import Engine
from ..engine.loading import load_model
from ..engine.options import EngineOptions
from .processes import process_cluster
from .report import write_json

# Of the router's timeline: what happens before the first token, and the transfer's end after it.
PARTS = ("queue_s", "grant_s", "prefill_queue_s", "prefill_s", "ttft_s", "transfer_exposed_s")


def main(
    model: Annotated[str, typer.Option(help="Model to serve.")] = "smollm2-135m",
    prompts: Annotated[int, typer.Option(min=3, help="Prompts, each sent both ways.")] = 40,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the bare engine and of each worker.")] = 1,
    transport: Annotated[str, typer.Option(help="auto, grpc or shared-memory.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
) -> None:
    """Median TTFT through router, prefill and decode worker minus that of a bare engine call."""
    asyncio.run(_main(model, prompts, prompt_tokens, threads, transport, seed, json_file))


async def _main(
    model: str, prompts: int, prompt_tokens: int, threads: int, transport: str, seed: int, json_file: Path | None
) -> None:
    options = EngineOptions(model=model, num_threads=threads, dtype="float32")
    loaded = await asyncio.to_thread(load_model, options)
    engine = Engine(loaded, options)
    rng = random.Random(seed)
    config = load_config(None, {"model": model, "transport": transport, "engine.dtype": "float32"})
    bare: list[float] = []
    split: list[float] = []
    parts: dict[str, list[float]] = {name: [] for name in PARTS}
    with tempfile.TemporaryDirectory() as logs:
        async with (
            process_cluster(config, Path(logs), num_threads=threads) as cluster,
            AsyncClient(cluster.router.address) as client,
        ):
            for number in track(range(prompts + 3), "prompts"):  # the first 3 warm up
                prompt = tuple(rng.randrange(1, loaded.vocab_size) for _ in range(prompt_tokens))
                bare_s = _bare_ttft(engine, f"bare-{number}", prompt)
                began_s = time.perf_counter()
                split_s = None
                async with client.stream(prompt, max_tokens=4, ignore_eos=True) as stream:
                    async for chunk in stream:
                        if split_s is None and chunk.token_ids:
                            split_s = time.perf_counter() - began_s
                assert split_s is not None, "no token came"
                if number >= 3:
                    bare.append(bare_s)
                    split.append(split_s)
                    timing = (await stream.result()).timing
                    for name, seconds in parts.items():
                        seconds.append(getattr(timing, name))
    rows = {"bare engine": bare, "router + prefill + decode": split, **{f"  {name}": parts[name] for name in PARTS}}
    table = Table(title=f"TTFT, {prompt_tokens}-token prompts, idle, {threads} thread(s), n={prompts}")
    for column in ("", "p50 ms", "p90 ms"):
        table.add_column(column, justify="left" if not column else "right")
    for name, seconds in rows.items():
        deciles = statistics.quantiles(seconds, n=10)
        table.add_row(name, f"{1e3 * statistics.median(seconds):.1f}", f"{1e3 * deciles[8]:.1f}")
    added_ms = 1e3 * (statistics.median(split) - statistics.median(bare))
    table.add_row("added (p50 - p50)", f"{added_ms:.1f}", "")
    Console().print(table)
    if json_file is not None:
        write_json(json_file, {"ttft_s": rows, "added_p50_ms": added_ms, "seed": seed, "warmup": 3, "n": prompts})


def _bare_ttft(engine: Engine, request_id: str, prompt: tuple[int, ...]) -> float:
    began_s = time.perf_counter()
    engine.add(Request(request_id=request_id, prompt_token_ids=prompt, max_tokens=1))
    while (output := engine.step()) is not None:
        if output.tokens:
            return time.perf_counter() - began_s
    raise AssertionError("the engine made no token")


if __name__ == "__main__":
    typer.run(main)
