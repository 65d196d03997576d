"""`splitserve plan`: how many prefill and decode workers serve a traffic, and whether to split at all."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ..core.errors import ConfigError
from ..planner import Plan, plan
from ..planner.calibration import merge_calibrations, read_calibration
from ..planner.document import cluster_yaml, write_candidates, write_json
from ..planner.gpus import GpuSpec, load_gpu
from ..planner.plots import plot
from ..planner.report import render
from . import planning_flags
from .options import check_output
from .traffic import read_traffic

INFEASIBLE = 3  # exit code


def command(
    model: Annotated[
        str, typer.Option(help="Built-in name, config.json or its directory, or its fields: hidden_size=4096,...")
    ],
    gpu: Annotated[list[str], typer.Option(help="Device of both pools, or FILE.yaml:NAME; several are tried.")],
    isl: planning_flags.Isl = None,
    osl: planning_flags.Osl = None,
    rate: planning_flags.Rate = None,
    trace: planning_flags.Trace = None,
    arrival_cv: planning_flags.ArrivalCv = 1.0,
    num_requests: planning_flags.NumRequests = None,
    decode_gpu: Annotated[
        list[str] | None, typer.Option(help="Device of the decode pool.", show_default="as --gpu")
    ] = None,
    ttft_ms: Annotated[float | None, typer.Option(help="Limit on the time to first token.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(help="Limit on the time per output token.")] = None,
    itl_ms: Annotated[float | None, typer.Option(help="Limit on each gap between two tokens.")] = None,
    percentile: Annotated[float, typer.Option(help="Of the requests that must meet the limits.")] = 90.0,
    max_gpus: Annotated[int, typer.Option(help="Most devices.")] = 64,
    objective: Annotated[
        Literal["cost", "goodput"], typer.Option(help="Least $/h for the rate, or most goodput for --max-gpus.")
    ] = "cost",
    price: Annotated[list[str] | None, typer.Option(help="$ an hour of a device: 3.1, or h200=3.1.")] = None,
    dtype: planning_flags.Dtype = None,
    kv_dtype: planning_flags.KvDtype = "bfloat16",
    tp: Annotated[
        list[int] | None, typer.Option(help="Tensor-parallel degree to try.", show_default="powers of two")
    ] = None,
    headroom: Annotated[float, typer.Option(help="Plan for this much more traffic; 0.2 is 20 %.")] = 0.0,
    n_plus_one: Annotated[bool, typer.Option("--n-plus-one", help="One spare worker in each pool.")] = False,
    link: planning_flags.Link = "ib400",
    chunk: Annotated[
        int | None,
        typer.Option(min=1, help="Prefill tokens of a step.", show_default="8192; colocated: the best of some"),
    ] = None,
    max_running: planning_flags.MaxRunning = None,
    num_kv_blocks: planning_flags.NumKvBlocks = None,
    prefix_cache: Annotated[bool, typer.Option(help="Reuse KV of prompts that begin alike.")] = False,
    engine: planning_flags.Engine = "splitserve",
    calibration: planning_flags.Calibrations = None,
    router_ms: planning_flags.RouterMs = 2.0,
    seed: planning_flags.TrafficSeed = 0,
    fast: Annotated[bool, typer.Option("--fast", help="Judge by formulas alone, without simulation.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the plan here (docs/planner.md).")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write all candidates here.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw it here, as PNG.")] = None,
    write_cluster: Annotated[
        Path | None, typer.Option(help="Write the chosen cluster here, for `splitserve up --config`.")
    ] = None,
) -> None:
    """Find the cheapest cluster that meets service levels, split and colocated, and say which to take.

    Exit code 3: nothing within the limits would do; the binding constraint is told.

    $ splitserve plan --model llama-3.1-8b --gpu h200 --isl 4000 --osl 500 --rate 10 --ttft-ms 600 --tpot-ms 25

    $ splitserve plan --model qwen3-32b --gpu h100 --decode-gpu h200 --isl 4000:0.5 --osl 500 --rate 20
    --ttft-ms 1000 --tpot-ms 25 --headroom 0.2 --n-plus-one --json plan.json --write-cluster cluster.yaml

    $ splitserve plan verify run.json --plan plan.json

    $ splitserve plan --model llama-3.1-70b --gpu h100 --trace mooncake.jsonl --prefix-cache --ttft-ms 4000 --tpot-ms 50
    """
    outputs = {"--json": json_file, "--csv": csv_file, "--plot": plot_file, "--write-cluster": write_cluster}
    for flag, file in outputs.items():
        check_output(flag, file)
    if plot_file is not None:
        importlib.import_module("matplotlib")  # before the search: its absence should not cost a minute
    traffic = read_traffic(trace, isl, osl, rate, arrival_cv, num_requests, seed)
    prices = _prices(price or [])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks = {name: progress.add_task(name, total=None, visible=False) for name in _PARTS}

        def show(part: str, number: int, of: int) -> None:
            progress.update(tasks[part], completed=number, total=of, visible=True)

        found = plan(
            model,
            [_priced(name, prices) for name in gpu],
            decode_gpu=[_priced(name, prices) for name in decode_gpu or gpu],
            requests=traffic.requests,
            notes=traffic.notes,
            traffic_flags=traffic.bench_flags,
            trace_rate=traffic.recorded_rate,
            ttft_s=_seconds(ttft_ms),
            tpot_s=_seconds(tpot_ms),
            itl_s=_seconds(itl_ms),
            percentile=percentile,
            dtype=dtype,
            kv_dtype=kv_dtype,
            tp=tp or (),
            max_gpus=max_gpus,
            objective=objective,
            headroom=headroom,
            n_plus_one=n_plus_one,
            link=link,
            chunk=chunk,
            max_running=max_running,
            num_kv_blocks=num_kv_blocks,
            prefix_cache=prefix_cache,
            router_s=router_ms / 1e3,
            engine=engine,
            calibration=merge_calibrations([read_calibration(path) for path in calibration]) if calibration else None,
            seed=seed,
            fast=fast,
            on_progress=show,
        )
    Console().print(render(found))
    _write(found, json_file=json_file, csv_file=csv_file, plot_file=plot_file, cluster_file=write_cluster)
    if found.verdict == "infeasible":
        raise typer.Exit(INFEASIBLE)


_PARTS = ("disaggregated", "colocated", "sensitivity")


def _write(
    found: Plan, *, json_file: Path | None, csv_file: Path | None, plot_file: Path | None, cluster_file: Path | None
) -> None:
    if json_file is not None:
        write_json(json_file, found, command=["splitserve", *sys.argv[1:]])
    if csv_file is not None:
        write_candidates(csv_file, found)
    if plot_file is not None:
        plot(found, plot_file)
    if cluster_file is not None and found.chosen is not None:
        cluster_file.write_text(cluster_yaml(found), encoding="utf-8")


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _prices(given: list[str]) -> dict[str, float]:
    """Device -> $ an hour; the empty name stands for every device."""
    found = {}
    for text in given:
        name, _, number = text.rpartition("=")
        try:
            found[name.lower()] = float(number)
        except ValueError:
            raise ConfigError(f"--price: {text!r} is neither a number nor GPU=NUMBER, such as h200=3.1") from None
        if not 0 <= found[name.lower()] < float("inf"):
            raise ConfigError(f"--price: {text}; it must not be negative")
    return found


def _priced(name: str, prices: dict[str, float]) -> GpuSpec:
    gpu = load_gpu(name)
    price = prices.get(gpu.name, prices.get(""))
    return gpu if price is None else replace(gpu, price_per_hour=price)
