"""What does one router process carry? Requests of one token and streamed tokens, before workers that compute nothing.

python -m splitserve.benchmarks.router --routers 1 --routers 2

Router, workers and clients are processes of their own. On a busy machine the router's CPU time is the figure to read:
one core carries a second's worth of it.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..core.config import load_config
from ..core.errors import SplitserveError
from ..deploy.process import Endpoint, RoleProcess, StartFailure
from ..deploy.roles import role_command, role_environment
from .report import write_json

WARMUP_S = 1.5
REQUESTS_WANTED, TOKENS_WANTED = 700.0, 10_000.0  # of one router, a second


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One kind of traffic, over all clients."""

    name: str
    output_tokens: int
    concurrency: int


LOADS = {
    "requests": Load(name="1-token answers", output_tokens=1, concurrency=64),
    "streams": Load(name="streams", output_tokens=200, concurrency=400),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one load came to, over all routers."""

    load: str
    num_routers: int
    requests_per_s: float
    tokens_per_s: float
    router_cpu_us_per_request: float
    router_cpu_us_per_token: float
    router_cores: float  # CPU seconds of the routers a second
    other_cores: float  # of workers and clients
    latency_p50_s: float
    latency_p99_s: float


def main(
    routers: Annotated[list[int] | None, typer.Option(help="Routers at once; repeatable.", show_default="1, 2")] = None,
    load: Annotated[
        list[str] | None, typer.Option(help="requests or streams; repeatable.", show_default="both")
    ] = None,
    clients: Annotated[int, typer.Option(min=1, help="Client processes.")] = 2,
    seconds: Annotated[float, typer.Option(min=2, help="Of each load, after the warm-up.")] = 8.0,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 64,
    step_ms: Annotated[float, typer.Option(min=1, help="Decode step of the workers.")] = 20.0,
    model: Annotated[str, typer.Option(help="Model whose tokenizer the routers use.")] = "smollm2-135m",
    profile: Annotated[
        Path | None, typer.Option(help="Write cProfile's figures of each router into this folder; slows it down.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
) -> None:
    """Requests and tokens a second, with the router's CPU time for each."""
    rows = []
    if unknown := set(load or ()) - set(LOADS):
        raise typer.BadParameter(f"unknown load {', '.join(sorted(unknown))}; known: {', '.join(LOADS)}")
    loads = [LOADS[name] for name in load or LOADS]
    if profile is not None:
        profile = profile.absolute()
        profile.mkdir(parents=True, exist_ok=True)
    for num_routers in routers or [1, 2]:
        rows += asyncio.run(_measure(num_routers, loads, clients, seconds, prompt_tokens, step_ms, model, profile))
    Console().print(_table(rows))
    for row in rows:
        if row.num_routers == 1:
            print(
                f"{row.load}: one core of the router carries {1e6 / row.router_cpu_us_per_request:,.0f} requests/s, "
                f"{1e6 / row.router_cpu_us_per_token:,.0f} tokens/s"
            )
    print(f"wanted of one router: {REQUESTS_WANTED:,.0f} 1-token requests/s and {TOKENS_WANTED:,.0f} streamed tokens/s")
    if profile is not None:
        print(f"profiles: python -m pstats {profile}/router-0.prof")
    if json_file is not None:
        write_json(json_file, {"seconds": seconds, "clients": clients, "rows": [asdict(row) for row in rows]})


async def _measure(
    num_routers: int,
    loads: Sequence[Load],
    num_clients: int,
    seconds: float,
    prompt_tokens: int,
    step_ms: float,
    model: str,
    profile: Path | None,
) -> list[Figures]:
    """Every load on a fresh cluster's routers, one after the other."""
    async with AsyncExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        async def start(name: str, command: Sequence[str]) -> Endpoint:
            process = RoleProcess(logs / f"{name}.log")
            stack.push_async_callback(process.stop, 3.0)
            started = await process.start(command, role_environment(1), 60.0)
            if isinstance(started, StartFailure):
                raise SplitserveError(f"{name}: {started.message}\n{started.log_tail}")
            return started

        module = [sys.executable, "-m", "splitserve.benchmarks.fake_worker"]
        worker = await start("worker", [*module, "--model", model, "--step-s", str(step_ms / 1e3)])
        config = load_config(None, {"model": model})
        routers = []
        for number in range(num_routers):
            name = f"router-{number}"
            command = role_command(config, "router", name=name, host="127.0.0.1", port=0, num_threads=1, http_port=-1)
            words = [*command, "--prefill", worker.address, "--decode", worker.address]
            if profile is not None:
                words = _profiled(words, profile / f"{name}.prof")
            routers.append(await start(name, words))
        return [await _run(load, routers, worker, num_clients, seconds, prompt_tokens) for load in loads]


def _profiled(words: list[str], path: Path) -> list[str]:
    """The same command under cProfile, which writes its figures to `path` at the end."""
    code = (
        "import cProfile, sys; from splitserve.cli.main import main; profile = cProfile.Profile(); profile.enable()\n"
        f"try: main()\nfinally: profile.disable(); profile.dump_stats({str(path)!r})"
    )
    return [words[0], "-c", code, *words[3:]]


async def _run(
    load: Load, routers: Sequence[Endpoint], worker: Endpoint, num_clients: int, seconds: float, prompt_tokens: int
) -> Figures:
    command = [sys.executable, "-m", "splitserve.benchmarks.router_client"]
    children = [
        await asyncio.create_subprocess_exec(
            *command,
            *("--address", routers[number % len(routers)].address),
            *("--concurrency", str(load.concurrency // num_clients)),
            *("--prompt-tokens", str(prompt_tokens), "--output-tokens", str(load.output_tokens)),
            *("--seconds", str(seconds + 4 * WARMUP_S)),
            stdout=asyncio.subprocess.PIPE,
        )
        for number in range(num_clients)
    ]
    pids = [router.pid for router in routers]
    others = [worker.pid, *(child.pid for child in children)]
    await asyncio.sleep(3 * WARMUP_S)  # clients import for a while, too
    cpu, other_cpu, began = _cpu_s(pids), _cpu_s(others), time.monotonic()
    await asyncio.sleep(seconds)
    cpu, other_cpu, ended = _cpu_s(pids) - cpu, _cpu_s(others) - other_cpu, time.monotonic()
    outputs = await asyncio.gather(*(child.communicate() for child in children))
    num_requests = num_tokens = 0
    latencies_s: list[float] = []
    for out, _ in outputs:
        told = json.loads(out)
        latencies_s += told["latencies_s"]
        for tenth, (requests, tokens) in told["counts"].items():
            if began <= int(tenth) / 10 < ended:
                num_requests += requests
                num_tokens += tokens
    took_s = ended - began
    return Figures(
        load=load.name,
        num_routers=len(routers),
        requests_per_s=num_requests / took_s,
        tokens_per_s=num_tokens / took_s,
        router_cpu_us_per_request=cpu / max(1, num_requests) * 1e6,
        router_cpu_us_per_token=cpu / max(1, num_tokens) * 1e6,
        router_cores=cpu / took_s,
        other_cores=other_cpu / took_s,
        latency_p50_s=statistics.median(latencies_s),
        latency_p99_s=statistics.quantiles(latencies_s, n=100)[98],
    )


def _cpu_s(pids: Sequence[int]) -> float:
    """CPU seconds of processes so far, user and system, all threads."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _table(rows: Sequence[Figures]) -> Table:
    table = Table(title="Routers before workers that compute nothing", title_justify="left", header_style="bold")
    columns = ("load", "routers", "requests/s", "tokens/s", "CPU us/request", "CPU us/token", "router cores")
    for column in (*columns, "other cores", "p50 / p99, ms"):
        table.add_column(column, justify="left" if column == "load" else "right")
    for row in rows:
        table.add_row(
            row.load,
            str(row.num_routers),
            f"{row.requests_per_s:,.0f}",
            f"{row.tokens_per_s:,.0f}",
            f"{row.router_cpu_us_per_request:,.0f}",
            f"{row.router_cpu_us_per_token:,.1f}",
            f"{row.router_cores:.2f}",
            f"{row.other_cores:.2f}",
            f"{row.latency_p50_s * 1e3:,.0f} / {row.latency_p99_s * 1e3:,.0f}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
