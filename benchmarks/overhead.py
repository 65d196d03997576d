"""What do the APIs, the router and the hand-over add to a bare worker call? A tiny model, one request at a time.

python -m splitserve.benchmarks.overhead --requests 100
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import grpc.aio
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..client import AsyncClient
from ..core.config import load_config
from ..proto import inference_pb2, worker_pb2, worker_pb2_grpc
from ..proto.convert import PROTOCOL_VERSION
from ..proto.rpc import CHANNEL_OPTIONS
from .processes import process_cluster
from .report import write_json

WARMUP, BLOCK = 3, 10  # calls of one kind in a row, not counted and counted
# (prompt, output tokens) -> arrival here of the first and the last token, seconds since the request was sent.
Call = Callable[[list[int], int], Awaitable[tuple[float, float]]]


def main(
    requests: Annotated[int, typer.Option(min=3, help="Requests of each kind, in blocks of ten.")] = 100,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 64,
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 32,
    model: Annotated[str | None, typer.Option(help="Model to serve.", show_default="a tiny random Llama")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
) -> None:
    """Median TTFT and time per token: a bare worker, a router before it, split workers, and HTTP before those."""
    asyncio.run(_main(requests, prompt_tokens, output_tokens, model, seed, json_file))


async def _main(
    num_requests: int, prompt_tokens: int, output_tokens: int, model: str | None, seed: int, json_file: Path | None
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        if model is None:
            from ..engine.testing import make_tiny_model

            model = str(make_tiny_model("llama", Path(directory) / "llama"))
        common = {"model": model, "engine.prefix_cache": False, "engine.self_check": False}
        whole = load_config(None, {**common, "colocated.replicas": 1})
        split = load_config(None, common)
        async with (
            process_cluster(whole, Path(directory) / "whole") as one,
            process_cluster(split, Path(directory) / "split") as two,
            bare_worker(one.workers["colocated-0"].address) as bare,
            http_calls(two.router.http_address, model) as http,
            AsyncClient(one.router.address) as one_client,
            AsyncClient(two.router.address) as two_client,
        ):
            calls: dict[str, Call] = {
                "bare worker": bare,
                "router, gRPC, colocated": grpc_call(one_client),
                "router, gRPC, split": grpc_call(two_client),
                "router, HTTP, split": http,
            }
            num_prompts = math.ceil(num_requests / BLOCK) * (WARMUP + BLOCK)
            prompts = await visible_prompts(one_client, num_prompts, prompt_tokens, random.Random(seed))
            times = await measure(calls, prompts, output_tokens, random.Random(seed))
    ttft = {name: [first for first, _ in rows] for name, rows in times.items()}
    per_token = {name: [(last - first) / (output_tokens - 1) for first, last in rows] for name, rows in times.items()}
    Console().print(_table(ttft, per_token, prompt_tokens, output_tokens))
    if json_file is not None:
        write_json(
            json_file, {"ttft_s": ttft, "per_token_s": per_token, "seed": seed, "warmup": WARMUP, "block": BLOCK}
        )


async def visible_prompts(client: AsyncClient, count: int, prompt_tokens: int, rng: random.Random) -> list[list[int]]:
    """Prompts whose answers begin with a whole character: of others HTTP shows the first token late."""
    prompts: list[list[int]] = []
    while len(prompts) < count:
        prompt = [rng.randrange(5, 200) for _ in range(prompt_tokens)]
        text = (await client.generate(prompt, max_tokens=1, ignore_eos=True)).text
        if text and text.isascii():
            prompts.append(prompt)
    return prompts


async def measure(
    calls: dict[str, Call], prompts: list[list[int]], output_tokens: int, rng: random.Random
) -> dict[str, list[tuple[float, float]]]:
    """Every call with each prompt, in blocks of one kind, so that what else the machine does hits all alike.

    The first calls of a block are not counted: its processes' code is not in the CPU's caches then, and no cluster
    that serves anybody is that cold. Blocks come in random order.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    blocks = [prompts[start : start + WARMUP + BLOCK] for start in range(0, len(prompts), WARMUP + BLOCK)]
    for block in track(blocks, "blocks"):
        for name in rng.sample(list(calls), len(calls)):
            for number, prompt in enumerate(block):
                pair = await calls[name](prompt, output_tokens)
                if number >= WARMUP:
                    times[name].append(pair)
    return times


@asynccontextmanager
async def bare_worker(address: str) -> AsyncIterator[Call]:
    """A session of our own with a colocated worker, as a router has one."""
    outbox: asyncio.Queue[worker_pb2.DecodeSessionRequest] = asyncio.Queue()
    hello = worker_pb2.RouterHello(protocol_version=PROTOCOL_VERSION, router_id="overhead")
    outbox.put_nowait(worker_pb2.DecodeSessionRequest(hello=hello))

    async def requests() -> AsyncIterator[worker_pb2.DecodeSessionRequest]:
        while True:
            yield await outbox.get()

    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        session = worker_pb2_grpc.DecodeWorkerStub(channel).DecodeSession(requests())
        number = 0

        async def call(prompt: list[int], output_tokens: int) -> tuple[float, float]:
            nonlocal number
            number += 1
            work = worker_pb2.WorkRequest(
                request_id=f"bare-{number}",
                attempt=1,
                prompt_token_ids=prompt,
                max_tokens=output_tokens,
                sampling=inference_pb2.SamplingParams(seed=0),
                timeout_s=60.0,
            )
            began_s, times = time.perf_counter(), list[float]()
            outbox.put_nowait(worker_pb2.DecodeSessionRequest(run=worker_pb2.RunLocal(request=work)))
            async for message in session:
                if message.HasField("tokens"):
                    now_s = time.perf_counter() - began_s
                    times += [now_s] * sum(len(entry.token_ids) for entry in message.tokens.sequences)
                    if len(times) >= output_tokens:
                        break
            return times[0], times[-1]

        try:
            yield call
        finally:
            session.cancel()


def grpc_call(client: AsyncClient) -> Call:
    async def call(prompt: list[int], output_tokens: int) -> tuple[float, float]:
        times = (await client.generate(prompt, max_tokens=output_tokens, ignore_eos=True)).token_times_s
        return times[0], times[-1]

    return call


@asynccontextmanager
async def http_calls(address: str, model: str) -> AsyncIterator[Call]:
    """Server-sent events over one plain socket: an HTTP library would be measured too."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))

    async def call(prompt: list[int], output_tokens: int) -> tuple[float, float]:
        nonlocal reader, writer
        if reader.at_eof():  # the server closes what is idle for seconds
            writer.close()
            reader, writer = await asyncio.open_connection(host, int(port))
        body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": output_tokens, "temperature": 0}
        data = json.dumps({**body, "ignore_eos": True, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ncontent-length: {len(data)}\r\n\r\n"
        began_s, times = time.perf_counter(), list[float]()
        writer.write(head.encode() + data)
        async for line in reader:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter() - began_s)
            elif line == b"0\r\n":  # the last chunk
                await reader.readline()
                break
        return times[0], times[-1]

    try:
        yield call
    finally:
        writer.close()


def _table(
    ttft: dict[str, list[float]], per_token: dict[str, list[float]], prompt_tokens: int, output_tokens: int
) -> Table:
    count = len(next(iter(ttft.values())))
    table = Table(title=f"{prompt_tokens} tokens in, {output_tokens} out, one request at a time, n={count}; ms")
    for column in ("", "TTFT p50", "p90", "added p50", "token p50", "p90", "added p50"):
        table.add_column(column, justify="right" if column else "left")
    bare_ttft, bare_token = (statistics.median(next(iter(rows.values()))) for rows in (ttft, per_token))
    for name in ttft:
        cells = [name]
        for rows, bare, digits in ((ttft[name], bare_ttft, 2), (per_token[name], bare_token, 3)):
            p50, p90 = statistics.median(rows), statistics.quantiles(rows, n=10)[8]
            cells += [f"{1e3 * value:.{digits}f}" for value in (p50, p90, p50 - bare)]
        table.add_row(*cells)
    return table


if __name__ == "__main__":
    typer.run(main)
