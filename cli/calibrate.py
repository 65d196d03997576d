"""`splitserve calibrate`: measure a worker, or read what it measured, and fit the latency model of plans to it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..client.routers import find_tls
from ..core.errors import ConfigError
from ..core.events import StepRecord
from ..planner.calibration import Calibration, KindFit, calibrate, read_records, write_calibration
from ..planner.probe import probe_worker
from ..proto import worker_pb2
from ..proto.tls import PeerRole
from .options import check_output


def command(
    worker: Annotated[
        str | None, typer.Option(help="HOST:PORT of an idle worker, to be driven through grids of steps.")
    ] = None,
    records: Annotated[
        list[Path] | None, typer.Option(help="Step records instead, as workers write them with --trace-dir.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("calibration.json"),
    seconds: Annotated[float, typer.Option(min=1, help="How long to drive the worker.")] = 120.0,
    seed: Annotated[
        int, typer.Option(min=0, help="Of prompts, of the order of the grid and of the held-out fifths.")
    ] = 0,
) -> None:
    """Fit the latency model to a worker, for `splitserve plan --calibration`.

    A prefill worker tells how long prompts take, a decode worker how long steps do: measure one of each. Needs nothing
    but the worker, which must be idle.

    $ splitserve calibrate --worker 127.0.0.1:7001 -o prefill.json

    $ splitserve calibrate --worker 127.0.0.1:7002 -o decode.json

    $ splitserve calibrate --records traces/decode-0-4711.jsonl -o decode.json
    """
    if (worker is None) == (not records):
        raise ConfigError("give either --worker or --records")
    check_output("--output", output)
    facts: Mapping[str, object] = {"measured_at": datetime.now(UTC).isoformat(timespec="seconds")}
    if worker is not None:
        steps, told = _probe(worker, seconds, seed)
        facts = {**facts, **told}
        source = f"{told['role']} worker {told['worker']}, {told['model']}, {facts['measured_at']}"
    else:
        steps = read_records(records or [])
        source = f"step records in {', '.join(path.name for path in records or [])}"
    found = calibrate(steps, source=source, seed=seed)
    write_calibration(output, found, facts)
    _print(found, output)


def _probe(address: str, seconds: float, seed: int) -> tuple[list[StepRecord], dict[str, object]]:
    columns = (TextColumn("steps"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=1.0)
        probed = asyncio.run(
            probe_worker(
                address,
                seconds=seconds,
                seed=seed,
                on_progress=lambda share: progress.update(task, completed=share),
                tls=find_tls(role=PeerRole.OPERATOR),
            )
        )
        progress.update(task, completed=1.0)
    info = probed.info
    return probed.records, {
        "worker": info.worker_id,
        "role": worker_pb2.Role.Name(info.role).removeprefix("ROLE_").lower(),
        "model": info.model,
        "num_kv_blocks": probed.status.num_blocks,
        "block_size": info.block_size,
        "max_step_tokens": info.max_step_tokens,
        "kv_bytes_per_token": info.kv_bytes_per_token,
    }


def _print(found: Calibration, output: Path) -> None:
    latency = found.latency
    table = Table(title=found.source, title_justify="left", header_style="bold")
    for name in ("", "steps", "error, held out", "cost", "5 to 95 %"):
        table.add_column(name, justify="right" if name and name != "cost" else "left")
    costs = {
        "prefill": (
            ("step", latency.prefill_base_s),
            ("token", latency.prefill_token_s),
            ("pair", latency.prefill_pair_s),
        ),
        "decode": (
            ("step", latency.decode_base_s),
            ("sequence", latency.decode_sequence_s),
            ("context token", latency.decode_context_s),
        ),
    }
    for kind, fit in (("prefill", found.prefill), ("decode", found.decode)):
        if fit is not None:
            _rows(table, kind, fit, costs[kind])
    console = Console()
    console.print(table)
    if num_left_out := sum(fit.num_left_out for fit in (found.prefill, found.decode) if fit is not None):
        console.print(f"{num_left_out:,} steps were left out: they took four times more or less than others like them")
    console.print(f"written to {output}; use it as: splitserve plan --calibration {output} ...")


def _rows(table: Table, kind: str, fit: KindFit, costs: tuple[tuple[str, float], ...]) -> None:
    for number, (name, seconds) in enumerate(costs):
        first = (kind, f"{fit.num_records:,}", f"{fit.error:.1%}") if number == 0 else ("", "", "")
        interval = f"{fit.low[name] * 1e6:,.3g} to {fit.high[name] * 1e6:,.3g}"
        table.add_row(*first, f"{seconds * 1e6:,.4g} us a {name}", interval)
