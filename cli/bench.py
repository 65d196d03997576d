"""`splitserve bench`: load a router and report what its clients would have seen."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import repeat
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..client import AsyncClient, Model, ModelNotFound, RequestOptions
from ..client.load import NO_RETRY, LoadSummary, RequestRecord, Slo, run_load, summarize
from ..client.workload import Workload, poisson_arrivals, prompts_workload, random_workload, trace_workload
from ..core.errors import ConfigError
from . import options


def command(
    address: options.Address = None,
    model: options.Model = "",
    rate: Annotated[float | None, typer.Option(help="Open loop: requests a second, Poisson arrivals.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Closed loop instead: requests open at any time.")] = None,
    num_requests: Annotated[int | None, typer.Option(help="Requests to send; default 100, or the whole file.")] = None,
    input_len: Annotated[int, typer.Option(help="Random prompts: tokens of each.")] = 512,
    output_len: Annotated[int, typer.Option(help="Tokens to generate for each (at most, with --prompts).")] = 64,
    prompts: Annotated[Path | None, typer.Option(help="Text file of prompts instead, one a line.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Trace instead: Mooncake .jsonl, Azure or timestamp,isl,osl .csv.")
    ] = None,
    time_scale: Annotated[float, typer.Option(help="Trace: factor on its times; 0.5 plays it twice as fast.")] = 1.0,
    max_input_len: Annotated[int | None, typer.Option(help="Trace: clip prompts to this many tokens.")] = None,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="Goodput: limit on TTFT.")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(help="Goodput: limit on TPOT.")] = None,
    slo_itl_p99_ms: Annotated[float | None, typer.Option(help="Goodput: limit on a request's own ITL p99.")] = None,
    temperature: options.Temperature = None,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals, prompts and sampling.")] = 0,
    warmup: Annotated[int, typer.Option(help="Short requests before the run, not counted.")] = 2,
    timeout: options.Timeout = 600.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every request's numbers here.")] = None,
) -> None:
    """Load a router over gRPC and report TTFT, TPOT, ITL, throughput and goodput.

    $ splitserve bench --rate 2 --num-requests 50 --input-len 256 --output-len 32

    $ splitserve bench --concurrency 8 --prompts prompts.txt --output-len 128

    $ splitserve bench --trace azure.csv --time-scale 0.5 --max-input-len 2048 --slo-ttft-ms 500 --json run.json
    """
    for flag, value in {
        "--rate": rate,
        "--concurrency": concurrency,
        "--num-requests": num_requests,
        "--input-len": input_len,
        "--output-len": output_len,
        "--max-input-len": max_input_len,
        "--time-scale": time_scale,
        "--slo-ttft-ms": slo_ttft_ms,
        "--slo-tpot-ms": slo_tpot_ms,
        "--slo-itl-p99-ms": slo_itl_p99_ms,
    }.items():
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{flag} is {value}; it must be above 0")
    if prompts and trace:
        raise ConfigError("--prompts and --trace are both given; choose one")
    if rate is not None and (concurrency or trace):
        raise ConfigError("--rate and --concurrency or --trace both set the pace; choose one")
    if rate is None and not concurrency and not trace:
        raise ConfigError("nothing sets the pace; give --rate (open loop), --concurrency (closed loop) or --trace")

    arrivals = repeat(0.0) if rate is None else poisson_arrivals(rate, seed)
    if trace:
        workload = trace_workload(
            trace, num_requests=num_requests, time_scale=time_scale, max_input_len=max_input_len, seed=seed
        )
    elif prompts:
        workload = prompts_workload(arrivals, prompts, num_requests=num_requests, output_len=output_len)
    else:
        workload = random_workload(
            arrivals, num_requests=num_requests or 100, input_len=input_len, output_len=output_len, seed=seed
        )
    slo = Slo(ttft_s=_seconds(slo_ttft_ms), tpot_s=_seconds(slo_tpot_ms), itl_p99_s=_seconds(slo_itl_p99_ms))
    request: RequestOptions = {"model": model, "temperature": temperature, "seed": seed, "timeout_s": timeout}
    options.check_output("--json", json_file)

    served, records = asyncio.run(_run(address, workload, request, concurrency=concurrency, warmup=warmup))
    summary = summarize(records, slo)
    _print(summary, slo, records, workload.notes)
    if json_file is not None:
        _write(json_file, served=served, summary=summary, slo=slo, seed=seed, warmup=warmup, records=records)
    if summary.num_finished == 0:
        raise typer.Exit(1)


async def _run(
    address: str | None, workload: Workload, request: RequestOptions, *, concurrency: int | None, warmup: int
) -> tuple[Model, list[RequestRecord]]:
    async with AsyncClient(address, retry=NO_RETRY) as client:
        served = await _served_model(client, request["model"])
        for number in range(warmup):
            short: RequestOptions = {**request, "max_tokens": 4}
            await client.generate([number % served.vocab_size] * 16, **short)
        columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=workload.num_requests, note="")
            num_failed = 0

            def show(record: RequestRecord) -> None:
                nonlocal num_failed
                num_failed += record.error is not None
                progress.update(task, advance=1, note=f"{num_failed} failed" if num_failed else "")

            records = await run_load(client, workload.make(served), request, concurrency=concurrency, on_end=show)
    return served, records


async def _served_model(client: AsyncClient, name: str) -> Model:
    """Raises: ModelNotFound: it is not served, or none is named and there is not exactly one."""
    served = await client.models()
    found = [model for model in served if not name or model.name == name]
    if len(found) != 1:
        names = ", ".join(model.name for model in served) or "none"
        raise ModelNotFound(f"--model is {name!r}; the router serves: {names}", field="model")
    return found[0]


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _print(summary: LoadSummary, slo: Slo, records: list[RequestRecord], notes: Sequence[str]) -> None:
    console = Console()
    table = Table(title="Latency, ms", title_justify="left", header_style="bold")
    for name in ("", "p50", "p90", "p99", "mean", "max", "n"):
        table.add_column(name, justify="right" if name else "left")
    rows = {"TTFT": summary.ttft_s, "TPOT": summary.tpot_s, "ITL": summary.itl_s, "end to end": summary.e2e_s}
    for name, figures in rows.items():
        if figures is not None:
            values = (figures.p50, figures.p90, figures.p99, figures.mean, figures.max)
            table.add_row(name, *(f"{value * 1e3:,.1f}" for value in values), f"{figures.n:,}")
    facts = Table.grid(padding=(0, 2))
    facts.add_row(
        "requests", f"{summary.num_finished:,} of {summary.num_requests:,} finished, {summary.duration_s:.2f} s"
    )
    facts.add_row(
        "throughput",
        f"{summary.requests_per_s:.2f} requests/s, {summary.input_tokens_per_s:,.1f} tokens/s in, "
        f"{summary.output_tokens_per_s:,.1f} out",
    )
    if slo != Slo():
        facts.add_row("goodput", f"{summary.goodput_per_s:.2f} requests/s ({summary.num_met_slo:,} met every SLO)")
    facts.add_row("send lag", f"{summary.max_send_lag_s * 1e3:,.1f} ms at most")
    for code, count in summary.errors.items():
        example = next(record.message for record in records if record.error == code)
        facts.add_row("failed", Text(f"{count:,} x {code}: {example}", style="red"))
    for note in notes:
        facts.add_row("note", note)
    console.print(table, facts)


def _write(
    path: Path,
    *,
    served: Model,
    summary: LoadSummary,
    slo: Slo,
    seed: int,
    warmup: int,
    records: list[RequestRecord],
) -> None:
    """The run with all that is needed to judge or repeat it."""
    derived = ("ttft_s", "tpot_s", "e2e_s")
    document = {
        "command": ["splitserve", *sys.argv[1:]],
        "version": __version__,
        "commit": _commit(),
        "client": {"host": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": dataclasses.asdict(served),
        "seed": seed,
        "warmup": warmup,
        "n": len(records),
        "slo": dataclasses.asdict(slo),
        "summary": dataclasses.asdict(summary),
        "requests": [
            {**dataclasses.asdict(record), **{name: getattr(record, name) for name in derived}} for record in records
        ],
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _commit() -> str | None:
    """Commit of the checkout that this runs from, None for an installed package."""
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
