"""Does scaling by service levels pay? Goodput per GPU against static splits and naive autoscalers, simulated.

python -m splitserve.benchmarks.scaling --trace mooncake --gpus 64
"""

from __future__ import annotations

import gc
import time
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..planner.simulated_scaling import ScalingOutcome, ScalingSimulation, ScalingTimes
from ..planner.simulator import RouterLimits
from .report import write_json
from .scaling_cases import Case, Scenario, cases, scenario

_BLOCK_TOKENS = 128  # of a simulated KV block: coarse, since cost grows with the number of blocks
_COLUMNS = (
    "case", "GPUs mean / most", "met both limits", "goodput, req/s", "per GPU", "TTFT p50 / p90 / p99, ms",
    "TPOT p90, ms", "starts, drains, switches", "reversals", "CPU s",
)  # fmt: skip


class Traffic(StrEnum):
    """Which traffic the cluster meets."""

    MOONCAKE = "mooncake"
    AZURE = "azure"
    SHIFT = "shift"


def main(
    trace: Annotated[
        list[Traffic] | None,
        typer.Option(help="mooncake, azure, or shift: from the one to the other; repeatable.", show_default="all"),
    ] = None,
    gpus: Annotated[int, typer.Option(min=4, help="GPU budget; the peak needs nine tenths of it.")] = 32,
    minutes: Annotated[float, typer.Option(min=0.1, help="Simulated time.")] = 10.0,
    startup: Annotated[float, typer.Option(min=0, help="Seconds that a new worker takes to serve.")] = 30.0,
    switch: Annotated[float, typer.Option(min=0, help="Seconds of a role switch, after its drain.")] = 2.0,
    shrink_after: Annotated[
        float, typer.Option(min=0, help="Seconds that a pool must need less before it shrinks, for all that scale.")
    ] = 120.0,
    period: Annotated[float, typer.Option(min=0.1, help="Seconds between two decisions.")] = 5.0,
    only: Annotated[
        list[str] | None, typer.Option(help="Only cases whose name holds this; repeatable.", show_default="all")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of where each tenant begins in the trace.")] = 0,
    plot_dir: Annotated[Path | None, typer.Option(help="Write a PNG of each traffic here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
) -> None:
    """Simulate a cluster under a load that changes, once for each way to size its pools.

    $ python -m splitserve.benchmarks.scaling --trace azure --gpus 24 --plot-dir docs/images

    $ python -m splitserve.benchmarks.scaling --trace azure --gpus 512 --minutes 2 --period 1 --startup 5 \
        --shrink-after 10 --only splitserve --only peak
    """
    times = ScalingTimes(period_s=period, startup_s=startup, switch_s=switch)
    report: list[dict[str, Any]] = []
    for one in trace or list(Traffic):
        found = scenario(one.value, max_gpus=gpus, duration_s=minutes * 60, seed=seed)
        chosen = [case for case in cases(found, times, shrink_after) if any(part in case.name for part in only or [""])]
        outcomes = _run_all(found, chosen, times, seed)
        _print(found, outcomes)
        report.append(_figures(found, outcomes))
        if plot_dir is not None:
            from .scaling_plots import plot

            plot_dir.mkdir(parents=True, exist_ok=True)
            plot(found, [(case.name, outcome) for case, outcome, _ in outcomes], plot_dir / f"scaling_{found.name}.png")
    if json_file is not None:
        write_json(json_file, {"seed": seed, "minutes": minutes, "times": asdict(times), "traffics": report})


Run = tuple[Case, ScalingOutcome, float]  # with the CPU seconds that it took


def _run_all(found: Scenario, chosen: list[Case], times: ScalingTimes, seed: int) -> list[Run]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    outcomes: list[Run] = []
    with Progress(*columns, transient=True, console=Console(stderr=True)) as progress:
        for case in chosen:
            task = progress.add_task(f"{found.name}: {case.name}", total=len(found.requests))
            started_s = time.process_time()
            simulation = ScalingSimulation(
                found.cluster(case.prefill, case.decode),
                found.requests,
                scaling=case.scaling,
                times=times,
                max_gpus=found.max_gpus,
                percentile=found.slo.percentile,
                seed=seed,
                limits=RouterLimits(max_queued=10**6, max_live=10**7),  # nobody is refused: lateness shows as such
                block_tokens=_BLOCK_TOKENS,
                on_progress=lambda num_ended, task=task: progress.update(task, completed=num_ended),
            )
            gc.disable()  # hundreds of thousands of live objects and no cycles worth looking for
            outcome = simulation.run_scaled()
            gc.enable()
            # What happened to each request one by one is not needed any more.
            outcome = replace(outcome, result=replace(outcome.result, marks=()))
            outcomes.append((case, outcome, cpu_s := time.process_time() - started_s))
            progress.remove_task(task)
            progress.console.print(f"{found.name}, {case.name}: simulated in {cpu_s:,.0f} s of CPU")
    return outcomes


def _print(found: Scenario, outcomes: list[Run]) -> None:
    slo, rate = found.slo, len(found.requests) / found.requests[-1].arrival_s
    assert slo.ttft_s is not None
    assert slo.tpot_s is not None
    title = (
        f"{found.name}: {len(found.requests):,} requests of {found.num_tenants} tenants ({found.source}), "
        f"{rate:,.0f} requests/s on average; TTFT {slo.ttft_s * 1e3:,.0f} ms, TPOT {slo.tpot_s * 1e3:,.0f} ms"
    )
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "case" else "right")
    for case, outcome, cpu_s in outcomes:
        row = _row(found, case, outcome)
        start = f" ({case.prefill} + {case.decode})" if case.scaling is None else ""
        table.add_row(
            case.name + start,
            f"{row['mean_gpus']:.1f} / {row['max_gpus']}",
            f"{row['met']:.1%}",
            f"{row['goodput_rps']:,.1f}",
            f"{row['goodput_per_gpu']:.3f}",
            " / ".join(f"{row['ttft_s'][p] * 1e3:,.0f}" for p in ("50", "90", "99")),
            f"{row['tpot_p90_s'] * 1e3:.1f}",
            ", ".join(str(row["actions"].get(kind, 0)) for kind in ("start", "drain", "switch")),
            str(row["reversals"]),
            f"{cpu_s:.0f}",
        )
    Console(width=200).print(table)


def _row(found: Scenario, case: Case, outcome: ScalingOutcome) -> dict[str, Any]:
    until_s, result = found.requests[-1].arrival_s, outcome.result
    met = result.met(found.slo)
    return {
        "case": case.name,
        "start": (case.prefill, case.decode),
        "mean_gpus": outcome.gpu_s / until_s,
        "max_gpus": outcome.max_gpus,
        "met": float(met.mean()),
        "goodput_rps": float(met.sum()) / until_s,
        "goodput_per_gpu": outcome.goodput_per_gpu(found.slo),
        "ttft_s": {str(q): result.percentile("ttft", q) for q in (50, 90, 99)},
        "tpot_p90_s": result.percentile("tpot", 90),
        "actions": outcome.num_actions,
        "reversals": outcome.num_reversals,
        "cached_share": float(result.cached_tokens.sum()) / sum(request.isl for request in found.requests),
        "failed": sum(result.errors.values()),
    }


def _figures(found: Scenario, outcomes: list[Run]) -> dict[str, Any]:
    return {
        "traffic": found.name,
        "source": found.source,
        "num_tenants": found.num_tenants,
        "num_requests": len(found.requests),
        "max_gpus": found.max_gpus,
        "slo": asdict(found.slo),
        "cases": [
            {**_row(found, case, outcome), "cpu_s": cpu_s, "samples": outcome.samples}
            for case, outcome, cpu_s in outcomes
        ],
    }


if __name__ == "__main__":
    typer.run(main)
