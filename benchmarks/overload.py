"""What is left of the service under more load than it can carry? Goodput with admission control and without.

python -m splitserve.benchmarks.overload
python -m splitserve.benchmarks.overload --cluster

The capacity is the highest rate at which 90 % of the requests meet the service level. Asked: goodput at twice the
capacity, and through a burst of ten times the traffic for 20 s. Simulated (two prefill and two decode workers, Llama
3.1 8B on H200, by the code that serves), or measured on real processes on this machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .overload_cluster import run
from .overload_runs import Measured
from .overload_simulation import simulate_all
from .report import write_json

Rows = Mapping[str, Mapping[str, Measured]]  # traffic -> policy -> what came of it
KEPT, GAINED = 0.9, 2.0  # wanted


def main(
    cluster: Annotated[bool, typer.Option(help="Real processes on this machine; five minutes.")] = False,
    model: Annotated[str, typer.Option(help="Of --cluster.")] = "smollm2-135m",
    seconds: Annotated[
        float | None,
        typer.Option(min=10, help="Of traffic in each run at a steady rate.", show_default="120, 20 with --cluster"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals and lengths.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
) -> None:
    """Exit code 1 if goodput at twice the capacity is below 0.9 of that at it, or admission gains less than 2x."""
    if cluster:
        seconds = seconds or 20.0
        capacity, rows, title = asyncio.run(run(model, seconds, seed))
    else:
        seconds = seconds or 120.0
        capacity, rows, title = simulate_all(seconds, seed)
    Console().print(_table(rows, f"{title}; capacity {capacity:.2f} requests/s"))
    kept = rows["2x capacity"]["refuse"].goodput_rps / rows["capacity"]["refuse"].goodput_rps
    burst = rows["10x burst"]
    gained = min(
        burst["refuse"].goodput_rps / max(row.goodput_rps, 1e-9) for name, row in burst.items() if name != "refuse"
    )
    print(f"goodput at 2x capacity over that at capacity: {kept:.3f} (wanted: {KEPT:g} or more)")
    print(f"goodput through the burst over that without admission control: {gained:.2f} (wanted: {GAINED:g} or more)")
    if json_file is not None:
        figures = {name: {policy: asdict(row) for policy, row in by.items()} for name, by in rows.items()}
        write_json(json_file, {"seed": seed, "seconds": seconds, "capacity_rps": capacity, "rows": figures})
    raise typer.Exit(int(kept < KEPT or gained < GAINED))


def _table(rows: Rows, title: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in ("traffic", "admission", "offered /s", "goodput /s", "met", "refused", "TTFT p90, s"):
        table.add_column(column, justify="left" if column in ("traffic", "admission") else "right")
    for name, by_policy in rows.items():
        for policy, row in by_policy.items():
            table.add_row(
                name,
                policy,
                f"{row.offered_rps:.2f}",
                f"{row.goodput_rps:.2f}",
                f"{row.met:.3f}",
                f"{row.refused:.3f}",
                f"{row.ttft_p90_s:.2f}",
            )
    return table


if __name__ == "__main__":
    typer.run(main)
