"""`splitserve simulate`: what a given cluster would do under a traffic, without the cluster."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import __version__
from ..core.config import ClusterConfig, load_config
from ..core.errors import ConfigError
from ..planner.calibration import merge_calibrations, read_calibration
from ..planner.gpus import link_bandwidth, load_gpu
from ..planner.latency import Provenance
from ..planner.models import load_model
from ..planner.question import Question, Role, worker_choices
from ..planner.simulation_result import SimulationResult
from ..planner.simulator import RouterLimits, simulate
from ..planner.traffic import mean_rate
from ..planner.types import ClusterSpec, PoolSpec, SimRequest, Slo
from ..scheduling.policies.registry import load_policy
from . import planning_flags
from .options import check_output
from .traffic import read_traffic

_CLIFF = 0.9  # share of time in steps from which a prefill pool's waits grow without bound


def command(
    gpu: Annotated[str, typer.Option(help="Device of the workers, or FILE.yaml:NAME; cpu is one.")],
    cluster: Annotated[
        Path | None, typer.Option(help="Cluster as `splitserve up --config` takes it; flags override it.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Built-in name, config.json or its directory.", show_default="the cluster's")
    ] = None,
    decode_gpu: Annotated[str | None, typer.Option(help="Device of the decode pool.", show_default="as --gpu")] = None,
    prefill: Annotated[int | None, typer.Option(min=0, help="Prefill workers.", show_default="1")] = None,
    decode: Annotated[int | None, typer.Option(min=0, help="Decode workers.", show_default="1")] = None,
    colocated: Annotated[int | None, typer.Option(min=0, help="Colocated workers instead.")] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Devices of a worker.", show_default="the cluster's")] = None,
    isl: planning_flags.Isl = None,
    osl: planning_flags.Osl = None,
    rate: planning_flags.Rate = None,
    trace: planning_flags.Trace = None,
    arrival_cv: planning_flags.ArrivalCv = 1.0,
    num_requests: planning_flags.NumRequests = None,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="Goodput: limit on TTFT.")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(help="Goodput: limit on TPOT.")] = None,
    slo_itl_ms: Annotated[float | None, typer.Option(help="Goodput: limit on a request's longest gap.")] = None,
    dtype: planning_flags.Dtype = None,
    kv_dtype: planning_flags.KvDtype = "bfloat16",
    link: planning_flags.Link = "ib400",
    chunk: Annotated[int | None, typer.Option(min=1, help="Prefill tokens of a step.", show_default="8192")] = None,
    max_running: planning_flags.MaxRunning = None,
    num_kv_blocks: planning_flags.NumKvBlocks = None,
    prefix_cache: Annotated[
        bool | None, typer.Option(help="Reuse KV of prompts that begin alike.", show_default="the cluster's, or on")
    ] = None,
    engine: planning_flags.Engine = "splitserve",
    calibration: planning_flags.Calibrations = None,
    router_ms: planning_flags.RouterMs = 2.0,
    seed: planning_flags.TrafficSeed = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every request's numbers here.")] = None,
) -> None:
    """Replay a trace, or synthetic traffic, on a cluster that need not exist.

    $ splitserve simulate --model llama-3.1-8b --gpu h200 --prefill 2 --decode 1 --isl 4000:0.5 --osl 500 --rate 10

    $ splitserve simulate --cluster cluster.yaml --gpu h100 --trace mooncake.jsonl --rate 2 --json simulation.json

    $ splitserve simulate --model llama-3.1-8b --gpu h100 --colocated 4 --trace azure --slo-ttft-ms 500 --slo-tpot-ms 30
    """
    check_output("--json", json_file)
    config = load_config(
        cluster,
        {
            "prefill.replicas": prefill,
            "decode.replicas": decode,
            "colocated.replicas": colocated,
            "engine.max_step_tokens": chunk,
            "engine.max_running": max_running,
            "engine.num_kv_blocks": num_kv_blocks,
            "engine.prefix_cache": prefix_cache,
        },
    )
    policy = load_policy(config.router.policy)
    traffic = read_traffic(trace, isl, osl, rate, arrival_cv, num_requests, seed)
    requests, notes = traffic.requests, traffic.notes
    slo = Slo(ttft_s=_seconds(slo_ttft_ms), tpot_s=_seconds(slo_tpot_ms), itl_s=_seconds(slo_itl_ms))
    bandwidth, latency_s = link_bandwidth(link)
    spec = load_model(model or config.model)
    question = Question(
        model=spec,
        prefill_gpus=(load_gpu(gpu),),
        decode_gpus=(load_gpu(decode_gpu or gpu),),
        requests=tuple(requests),
        slo=slo,
        dtype=dtype or config.engine.dtype or spec.quantization or "bfloat16",
        kv_dtype=kv_dtype,
        link_bytes_per_s=bandwidth,
        link_latency_s=latency_s,
        chunk=config.engine.max_step_tokens or (256 if gpu == "cpu" else 8192),
        max_running=config.engine.max_running,
        block_size=config.engine.block_size,
        num_kv_blocks=config.engine.num_kv_blocks,
        prefix_cache=config.engine.prefix_cache,
        router_s=router_ms / 1e3,
        engine=engine,
        calibration=merge_calibrations([read_calibration(path) for path in calibration]) if calibration else None,
        seed=seed,
    )
    simulated, provenance, pools = _cluster(config, question, tp)
    limits = RouterLimits(
        max_queued=config.router.max_queued,
        max_live=config.router.max_live,
        prefill_bound_s=config.router.prefill_bound_s,
        admission=config.router.admission,
        ttft_target_s=config.router.ttft_target_s,
        tpot_target_s=config.router.tpot_target_s,
        ageing_s=config.router.ageing_s,
        local_prefill_itl_s=config.router.local_prefill_itl_s if config.engine.local_prefill else None,
    )
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(requests))
        result = simulate(
            simulated,
            requests,
            seed=seed,
            limits=limits,
            policy=policy,
            on_progress=lambda num_ended: progress.update(task, completed=num_ended),
        )
    _print(result, slo, pools, [*notes, *_warnings(result), *(str(source) for source in provenance)])
    if json_file is not None:
        document = _document(result, slo, pools, requests, notes=notes, provenance=provenance, seed=seed)
        json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _cluster(
    config: ClusterConfig, question: Question, tp: int | None
) -> tuple[ClusterSpec, list[Provenance], dict[str, str]]:
    """The cluster, where its latencies come from, and each pool in words.

    Raises: ConfigError: it has split and colocated workers at once, or the model fits on none of them.
    """
    if config.replicas("colocated") and config.replicas("prefill"):
        raise ConfigError(
            f"{config.replicas('prefill')} prefill and {config.replicas('colocated')} colocated workers; "
            "a simulation is of one kind: set --prefill 0 and --decode 0, or --colocated 0"
        )
    pools: dict[Role, PoolSpec] = {}
    provenance: list[Provenance] = []
    told: dict[str, str] = {}
    roles: tuple[Role, ...] = ("prefill", "decode") if config.replicas("prefill") else ("colocated",)
    for role in roles:
        degree = tp or config.tensor_parallel(role)
        (choice,) = worker_choices(replace(question, tp=(degree,)), role)
        replicas = config.replicas(role)
        pools[role] = PoolSpec(worker=choice.spec, num_workers=replicas)
        told[role] = f"{replicas} x TP{choice.tp} {choice.gpu.name}, {choice.spec.num_blocks:,} KV blocks each"
        if choice.provenance not in provenance:
            provenance.append(choice.provenance)
    spec = ClusterSpec(
        prefill=pools.get("prefill"),
        decode=pools.get("decode") or pools["colocated"],
        kv_bytes_per_token=question.kv_bytes_per_token,
        link_bytes_per_s=question.link_bytes_per_s,
        link_latency_s=question.link_latency_s,
        router_s=question.router_s,
        prefix_cache=question.prefix_cache,
    )
    return spec, provenance, told


def _warnings(result: SimulationResult) -> list[str]:
    found = []
    busy = result.utilisation.get("prefill", 0.0)
    if busy > _CLIFF:
        found.append(f"prefill is busy {busy:.0%} of the time: a little more load means a lot more waiting")
    if result.num_preemptions:
        found.append(f"{result.num_preemptions:,} sequences were preempted: the KV pool is short")
    return found


def _print(result: SimulationResult, slo: Slo, pools: dict[str, str], notes: list[str]) -> None:
    console = Console()
    table = Table(title="Latency, ms", title_justify="left", header_style="bold")
    for name in ("", "p50", "p90", "p99", "mean", "max"):
        table.add_column(name, justify="right" if name else "left")
    for title, quantity in (
        ("TTFT", "ttft"),
        ("TPOT", "tpot"),
        ("ITL", "itl"),
        ("queue", "queue"),
        ("end to end", "e2e"),
    ):
        figures = asdict(result.percentiles(quantity))
        table.add_row(title, *(_milliseconds(figures[name]) for name in ("p50", "p90", "p99", "mean", "max")))
    facts = Table.grid(padding=(0, 2))
    for role, told in pools.items():
        batch = "" if role == "prefill" else f", {result.mean_batch[role]:.1f} sequences a step"
        facts.add_row(role, f"{told}, busy {result.utilisation[role]:.0%} of the time{batch}")
    facts.add_row(
        "requests", f"{result.num_finished:,} of {result.num_requests:,} finished, {result.duration_s:,.1f} s"
    )
    facts.add_row(
        "throughput", f"{result.requests_per_s:.2f} requests/s, {result.output_tokens_per_s:,.1f} tokens/s out"
    )
    if slo != Slo():
        facts.add_row("goodput", f"{result.goodput(slo):.2f} requests/s ({result.met(slo).sum():,} met every SLO)")
    if result.kv_bytes:
        facts.add_row(
            "KV moved",
            f"{result.kv_bytes / 1e9:,.1f} GB, {result.kv_bytes_per_s / 1e9:.2f} GB/s, busiest link "
            f"{result.link_utilisation:.0%} used",
        )
    if result.cached_tokens.any():
        facts.add_row("cached", f"{result.cached_tokens.sum():,} prompt tokens")
    for code, count in result.errors.items():
        facts.add_row("failed", f"{count:,} x {code}")
    for note in notes:
        facts.add_row("note", note)
    console.print(table, facts)


def _milliseconds(value: float) -> str:
    return f"{value * 1e3:,.1f}" if math.isfinite(value) else "-" if math.isnan(value) else "failed"


def _document(
    result: SimulationResult,
    slo: Slo,
    pools: dict[str, str],
    requests: list[SimRequest],
    *,
    notes: tuple[str, ...],
    provenance: list[Provenance],
    seed: int,
) -> dict[str, Any]:
    """The run with all that is needed to judge or repeat it; what failed or does not exist is null."""
    columns = ("arrival_s", "ttft_s", "tpot_s", "itl_max_s", "e2e_s", "queue_s", "transfer_s", "transfer_exposed_s")
    rows = zip(*(getattr(result, name).tolist() for name in columns), strict=True)
    return {
        "format": 1,
        "command": ["splitserve", *sys.argv[1:]],
        "version": __version__,
        "seed": seed,
        "cluster": pools,
        "rate": mean_rate(requests),
        "n": result.num_requests,
        "num_finished": result.num_finished,
        "errors": result.errors,
        "duration_s": result.duration_s,
        "slo": asdict(slo),
        "goodput_rps": result.goodput(slo),
        "output_tokens_per_s": result.output_tokens_per_s,
        "utilisation": result.utilisation,
        "mean_batch": result.mean_batch,
        "link_utilisation": result.link_utilisation,
        "kv_gb_per_s": result.kv_bytes_per_s / 1e9,
        "preemptions": result.num_preemptions,
        **{
            f"{quantity}_s": {name: _finite(value) for name, value in asdict(result.percentiles(quantity)).items()}
            for quantity in ("ttft", "tpot", "itl", "queue", "e2e")
        },
        "notes": list(notes),
        "provenance": [str(source) for source in provenance],
        "requests": [
            {
                "isl": request.isl,
                "osl": request.osl,
                "cached_tokens": int(cached),
                **{name: _finite(value) for name, value in zip(columns, row, strict=True)},
            }
            for request, cached, row in zip(requests, result.cached_tokens, rows, strict=True)
        ],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
