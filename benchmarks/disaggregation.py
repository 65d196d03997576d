"""Does splitting keep its promise? TTFT of an ideal queue before a bare prefill, and even gaps between tokens.

python -m splitserve.benchmarks.disaggregation --json 1p1d.json
python -m splitserve.benchmarks.disaggregation --colocated --json colocated.json
python -m splitserve.benchmarks.disaggregation --model smollm2-135m --device cpu --rows 256/32/1 --seconds 20

Starts a router and two workers, one on each GPU, and loads them through the router's public API with Poisson arrivals.
The ideal queue replays the same arrivals through as many servers as compute prompts, whose service time is the bare
prefill, measured in the same run with one prompt after the other.
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from heapq import heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..client import AsyncClient
from ..client.load import percentile
from ..core.config import load_config
from .processes import process_cluster
from .report import write_json

ROWS = "2048/256/8,2048/256/16,2048/512/16,8192/128/3,8192/128/4"
_BARE_PROMPTS = 12
_CLIENT_START_S = 6.0
_DRAIN_S = 40.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One load. Milliseconds, over the requests that arrived after the warm-up."""

    input_len: int
    output_len: int
    rate: float
    num_requests: int
    num_failed: int
    prefill_ms: float  # bare: one prompt after the other without a pause, as the worker measures it
    idle_prefill_ms: float  # with pauses, in which the device cools and clocks up
    ttft_p50_ms: float
    ttft_p99_ms: float
    ideal_p50_ms: float
    ideal_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    second_gap_p50_ms: float  # between tokens 0 and 1: the hand-over
    second_gap_p99_ms: float
    exposed_p50_ms: float  # of the transfer
    exposed_p99_ms: float
    output_tokens_per_s: float
    offered_tokens_per_s: float
    ideal_tokens_per_s: float  # of the ideal queue and a token every median gap; what was offered late ends later
    send_lag_p99_ms: float  # of the clients themselves: when large, distrust the row
    transport: str


def main(
    model: Annotated[str, typer.Option(help="A model, or a shape of gpu_engine.py with random weights.")] = (
        "llama-3.1-8b"
    ),
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    gpus: Annotated[str, typer.Option(help="GPU of each of the two workers.")] = "0,1",
    colocated: Annotated[bool, typer.Option(help="Two colocated workers instead of one of each role.")] = False,
    rows: Annotated[str, typer.Option(help="input length/output length/requests a second, with commas.")] = ROWS,
    warmup: Annotated[float, typer.Option(help="Seconds of load that are not counted.")] = 20.0,
    seconds: Annotated[float, typer.Option(help="Seconds of load that are.")] = 60.0,
    clients: Annotated[
        int | None, typer.Option(min=1, help="Client processes that share the load.", show_default="16; 4 on cpu")
    ] = None,
    routers: Annotated[int, typer.Option(help="Router processes; each client uses one of them.")] = 4,
    log_dir: Annotated[
        Path | None, typer.Option(help="Keep the processes' logs and each request's times here.")
    ] = None,
    trace_dir: Annotated[Path | None, typer.Option(help="Write step records and events here.")] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals and prompts.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
) -> None:
    """Measure and print a table."""
    loads = [_parse(text) for text in rows.split(",")]
    clients = clients or (16 if device == "cuda" else 4)
    with tempfile.TemporaryDirectory() as folder:
        settings = model_settings(model, device, Path(folder))
        settings |= {"engine.prefix_cache": False, "router.replicas": routers}
        if colocated:
            settings["colocated.replicas"] = 2
        if trace_dir is not None:
            settings["trace_dir"] = trace_dir
        config = load_config(None, settings)
        names = ("colocated-0", "colocated-1") if colocated else ("prefill-0", "decode-0")
        placed = dict(zip(names, map(int, gpus.split(",")), strict=True)) if device == "cuda" else None
        log_dir = log_dir or Path(folder)
        log_dir.mkdir(parents=True, exist_ok=True)
        measured = asyncio.run(_measure(config, placed, loads, warmup, seconds, clients, seed, log_dir, json_file))
    _print(measured, f"{model}, {'2 colocated' if colocated else '1 prefill + 1 decode'}")


async def _measure(
    config: Any,
    gpus: dict[str, int] | None,
    loads: Sequence[tuple[int, int, float]],
    warmup_s: float,
    seconds: float,
    clients: int,
    seed: int,
    log_dir: Path,
    json_file: Path | None,
) -> list[Row]:
    measured = []
    async with process_cluster(config, log_dir, gpus=gpus) as cluster:
        for load in loads:
            idle_s = await _bare_prefill_s(cluster.router.address, load[0], in_flight=1)
            prefill_s = await _bare_prefill_s(cluster.router.address, load[0], in_flight=3)
            addresses = [router.address for router in cluster.routers]
            requests = await _load(addresses, load, warmup_s + seconds, clients, seed, log_dir)
            num_servers = config.replicas("prefill") + config.replicas("colocated")
            measured.append(_row(load, requests, prefill_s, idle_s, warmup_s, seconds, num_servers))
            print(measured[-1], file=sys.stderr, flush=True)
            if json_file is not None:  # after each row: a run of many minutes may be cut short
                figures = {
                    "seed": seed,
                    "warm_up_s": warmup_s,
                    "seconds": seconds,
                    "rows": [asdict(r) for r in measured],
                }
                write_json(json_file, figures, device=_device_name(gpus))
    return measured


async def _bare_prefill_s(address: str, input_len: int, *, in_flight: int) -> float:
    """Median of what the worker measures from a prompt's first step to its first token.

    `in_flight` 1 leaves pauses between the prompts; 3 keep both workers of a colocated pair busy.
    """
    async with AsyncClient(address) as client:
        await client.generate([1, 2, 3], max_tokens=1)  # the router waits for its workers
        (model,) = await client.models()
        turn = asyncio.Semaphore(in_flight)

        async def one(number: int) -> float:
            async with turn:
                prompt = [(7919 * number + 31 * i) % (model.vocab_size - 1) for i in range(input_len)]
                result = await client.generate(prompt, max_tokens=2, ignore_eos=True, timeout_s=120.0)
                return result.timing.prefill_s

        count = _BARE_PROMPTS * in_flight
        times = await asyncio.gather(*(one(number) for number in range(count)))
    return statistics.median(times[count // 2 :])


async def _load(
    addresses: Sequence[str], load: tuple[int, int, float], seconds: float, clients: int, seed: int, folder: Path
) -> list[dict[str, Any]]:
    """Every request of all client processes, in order of arrival."""
    input_len, output_len, rate = load
    start_at = time.monotonic() + _CLIENT_START_S
    run = f"{input_len}-{output_len}-{rate:g}-seed{seed}-{time.strftime('%H%M%S')}"
    outs = [folder / f"requests-{run}-{number}.jsonl" for number in range(clients)]
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-m", "splitserve.benchmarks.load_client",
            "--address", addresses[number % len(addresses)],
            "--rate", str(rate / clients), "--seconds", str(seconds),
            "--input-len", str(input_len), "--output-len", str(output_len), "--start-at", str(start_at),
            "--seed", str(seed * 1000 + number), "--out", str(out),
        )
        for number, out in enumerate(outs)
    ]  # fmt: skip
    try:
        async with asyncio.timeout(_CLIENT_START_S + seconds + _DRAIN_S):
            codes = await asyncio.gather(*(process.wait() for process in processes))
    except TimeoutError:
        raise SystemExit(
            f"{_DRAIN_S:g} s after the last of {rate:g} requests a second there still were some without their end: "
            "that is more than this cluster can carry, or something hangs; lower the rate in --rows, or see the logs "
            "in --log-dir"
        ) from None
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
    if any(codes):
        raise SystemExit("a load client failed; see above")
    rows = [json.loads(line) for out in outs for line in out.read_text(encoding="utf-8").splitlines()]
    return sorted(rows, key=lambda row: float(row["scheduled_s"]))


def ideal_ttft_s(arrivals_s: Sequence[float], service_s: float, num_servers: int = 1) -> list[float]:
    """Seconds from each arrival to its end in one queue before so many servers, first come first served."""
    free_at, times = [-math.inf] * num_servers, []
    for arrival in arrivals_s:
        ends_at = max(heappop(free_at), arrival) + service_s
        heappush(free_at, ends_at)
        times.append(ends_at - arrival)
    return times


def _row(
    load: tuple[int, int, float],
    requests: list[dict[str, Any]],
    prefill_s: float,
    idle_s: float,
    warmup_s: float,
    seconds: float,
    num_servers: int,
) -> Row:
    input_len, output_len, rate = load
    ideal = ideal_ttft_s([row["scheduled_s"] for row in requests], prefill_s, num_servers)
    both = [(row, best) for row, best in zip(requests, ideal, strict=True) if row["scheduled_s"] >= warmup_s]
    counted = [row for row, _ in both]
    answered = [row for row in counted if row["error"] is None]
    gaps = [[b - a for a, b in pairwise(row["token_times_s"])] for row in answered]
    in_window = sum(warmup_s <= at < warmup_s + seconds for row in requests for at in row["token_times_s"])

    def ms(values: Sequence[float], q: float) -> float:
        return 1e3 * percentile(values, q)

    ttft = [row["token_times_s"][0] - row["scheduled_s"] for row in answered]
    every = [gap for one in gaps for gap in one]
    second = [one[0] for one in gaps]
    exposed = [row["exposed_s"] for row in answered]
    best = [value for _, value in both]
    itl_p50_s = percentile(every, 50)
    ideal_first = [row["scheduled_s"] + wait for row, wait in zip(requests, ideal, strict=True)]
    ideal_in_window = sum(
        warmup_s <= first + number * itl_p50_s < warmup_s + seconds
        for first in ideal_first
        for number in range(output_len)
    )
    return Row(
        input_len=input_len,
        output_len=output_len,
        rate=rate,
        num_requests=len(counted),
        num_failed=len(counted) - len(answered),
        prefill_ms=1e3 * prefill_s,
        idle_prefill_ms=1e3 * idle_s,
        ttft_p50_ms=ms(ttft, 50),
        ttft_p99_ms=ms(ttft, 99),
        ideal_p50_ms=ms(best, 50),
        ideal_p99_ms=ms(best, 99),
        itl_p50_ms=ms(every, 50),
        itl_p99_ms=ms(every, 99),
        second_gap_p50_ms=ms(second, 50),
        second_gap_p99_ms=ms(second, 99),
        exposed_p50_ms=ms(exposed, 50),
        exposed_p99_ms=ms(exposed, 99),
        output_tokens_per_s=in_window / seconds,
        offered_tokens_per_s=len(counted) * output_len / seconds,
        ideal_tokens_per_s=ideal_in_window / seconds,
        send_lag_p99_ms=ms([row["sent_s"] - row["scheduled_s"] for row in counted], 99),
        transport=answered[0]["transport"],
    )


def _print(rows: Sequence[Row], title: str) -> None:
    table = Table(title=f"{title}; ms, p50 / p99")
    headings = (
        "ISL/OSL, req/s",
        "n",
        "TTFT",
        "of an ideal queue",
        "ratio",
        "ITL",
        "p99/p50",
        "gap 0 to 1",
        "exposed",
        "tokens/s",
        "of offered",
        "ideal queue",
    )
    for column in headings:
        table.add_column(column, justify="left" if column == headings[0] else "right")
    for row in rows:
        table.add_row(
            f"{row.input_len}/{row.output_len}, {row.rate:g}",
            f"{row.num_requests}" + (f" ({row.num_failed} failed)" if row.num_failed else ""),
            f"{row.ttft_p50_ms:.1f} / {row.ttft_p99_ms:.1f}",
            f"{row.ideal_p50_ms:.1f} / {row.ideal_p99_ms:.1f}",
            f"{row.ttft_p50_ms / row.ideal_p50_ms:.2f} / {row.ttft_p99_ms / row.ideal_p99_ms:.2f}",
            f"{row.itl_p50_ms:.2f} / {row.itl_p99_ms:.2f}",
            f"{row.itl_p99_ms / row.itl_p50_ms:.2f}",
            f"{row.second_gap_p50_ms:.1f} / {row.second_gap_p99_ms:.1f}",
            f"{row.exposed_p50_ms:.2f} / {row.exposed_p99_ms:.2f}",
            f"{row.output_tokens_per_s:.0f}",
            f"{row.output_tokens_per_s / row.offered_tokens_per_s:.3f}",
            f"{row.ideal_tokens_per_s / row.offered_tokens_per_s:.3f}",
        )
    Console(width=170).print(table)


def _parse(text: str) -> tuple[int, int, float]:
    try:
        input_len, output_len, rate = text.split("/")
        return int(input_len), int(output_len), float(rate)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not input length/output length/rate, such as 2048/256/8") from None


def model_settings(model: str, device: str, folder: Path) -> dict[str, Any]:
    """The configuration of a model, or on a GPU of a shape with random weights, whose directory goes into `folder`."""
    settings: dict[str, Any] = {"model": model, "engine.device": device}
    if device == "cuda":
        from .gpu_engine import shapes

        settings["engine.max_model_len"] = 16384
        if model in shapes():
            settings |= {"model": _write_shape(model, folder / model), "engine.random_weights": True}
    return settings


def _write_shape(name: str, folder: Path) -> str:
    """A model directory without weights: config, and a tokenizer that has a word for every token that may come out."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from .gpu_engine import shapes

    config = shapes()[name]
    config.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def _device_name(gpus: dict[str, int] | None) -> str:
    if gpus is None:
        return "cpu"
    import torch

    return ", ".join(torch.cuda.get_device_name(index) for index in gpus.values())


if __name__ == "__main__":
    typer.run(main)
