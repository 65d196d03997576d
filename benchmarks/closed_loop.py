"""Is the plan right? Calibrate a 1P1D cluster on this machine, predict, then measure what was predicted.

python -m splitserve.benchmarks.closed_loop
python -m splitserve.benchmarks.closed_loop --device cuda --model llama-3.1-8b --input-len 2048 --output-len 256
python -m splitserve.benchmarks.closed_loop --device cuda --model llama-3.1-8b --input-len 2048 --colocated  # one GPU

Grids of steps tell roughly what the workers can do; then traffic of other lengths, at half load, tells what their steps
cost while they share the machine. Predictions are on disk before the first measured request is sent. They are of the
same arrivals that are then sent.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from ..client import AsyncClient, RequestOptions
from ..client.load import NO_RETRY, RequestRecord, percentile, run_load
from ..client.workload import LoadRequest, poisson_arrivals, random_workload
from ..core.config import load_config
from ..core.events import StepRecord
from ..planner.calibration import Calibration, calibrate, merge_calibrations, read_records
from ..planner.closed_form import estimate
from ..planner.gpus import link_bandwidth
from ..planner.load import Load
from ..planner.probe import Probed, probe_worker
from ..planner.question import GPU_PACKED_TOKENS
from ..planner.simulator import simulate
from ..planner.types import ClusterSpec, PoolSpec, SimRequest, WorkerSpec
from .disaggregation import model_settings
from .processes import WORKER_ROLES, process_cluster
from .report import write_json

Device = Literal["cpu", "cuda"]

# Relative error that a percentile may have. On a CPU both workers share cores and memory with everybody else.
_BOUNDS: dict[Device, dict[int, float]] = {"cpu": {50: 0.15, 90: 0.25}, "cuda": {50: 0.10, 90: 0.20}}
_LINKS: dict[Device, str] = {"cpu": "shared-memory", "cuda": "nvlink"}
_PERCENTILES = (50, 90)
_CALIBRATED_AT = 0.5  # utilisation
_NO_QUEUE_S = 0.001


def main(
    model: Annotated[str, typer.Option(help="A model, or a shape of gpu_engine.py with random weights.")] = (
        "smollm2-135m"
    ),
    device: Annotated[Device, typer.Option(help="Where the workers run.")] = "cpu",
    colocated: Annotated[bool, typer.Option("--colocated", help="One worker that does both.")] = False,
    gpus: Annotated[
        str | None, typer.Option(help="The GPU of each worker.", show_default="0,1; with --colocated 0")
    ] = None,
    input_len: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 96,
    output_len: Annotated[int, typer.Option(min=2, help="Answer tokens.")] = 24,
    num_requests: Annotated[int, typer.Option(min=10, help="Requests at each rate.")] = 100,
    utilisations: Annotated[
        list[float] | None, typer.Option("--utilisation", help="Of the busier pool.", show_default="0.3, 0.5, 0.7")
    ] = None,
    calibrate_s: Annotated[float, typer.Option(min=1, help="Seconds to drive the workers through grids.")] = 25.0,
    seed: Annotated[int, typer.Option(help="Of arrivals and prompts.")] = 0,
    trace_dir: Annotated[Path | None, typer.Option(help="Keep the workers' steps and events here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
) -> None:
    """Exit code 1 if a percentile is further off than 15 % (p50) or 25 % (p90); on GPUs 10 % and 20 %."""
    wanted = utilisations or [0.3, 0.5, 0.7]
    names = ("colocated-0",) if colocated else ("prefill-0", "decode-0")
    indices = (gpus or "0,1").split(",")
    if device == "cuda" and len(indices) < len(names):
        raise typer.BadParameter("one for each worker, such as 0,1", param_hint="--gpus")
    if trace_dir is not None and any(trace_dir.glob("*.jsonl")):
        raise typer.BadParameter("holds records of another run", param_hint="--trace-dir")
    placed = dict(zip(names, map(int, indices), strict=False)) if device == "cuda" else None
    raise typer.Exit(
        asyncio.run(
            _main(
                model,
                device,
                names,
                placed,
                input_len,
                output_len,
                num_requests,
                wanted,
                calibrate_s,
                seed,
                trace_dir,
                json_file,
            )
        )
    )


async def _main(
    model: str,
    device: Device,
    names: tuple[str, ...],
    placed: dict[str, int] | None,
    input_len: int,
    output_len: int,
    num_requests: int,
    utilisations: list[float],
    calibrate_s: float,
    seed: int,
    trace_dir: Path | None,
    json_file: Path | None,
) -> int:
    predictions_file = Path(tempfile.mkdtemp()) / "predictions.json"
    with tempfile.TemporaryDirectory() as logs:
        traces = trace_dir or Path(logs) / "traces"
        config = load_config(
            None,
            model_settings(model, device, Path(logs))
            | {f"{role}.replicas": int(f"{role}-0" in names) for role in WORKER_ROLES}
            | {"engine.prefix_cache": False, "engine.self_check": False, "trace_dir": str(traces)},
        )
        async with process_cluster(config, Path(logs), gpus=placed) as cluster:
            # All at once, as they will serve: they share this machine's memory and power.
            probed = await asyncio.gather(
                *(probe_worker(cluster.workers[name].address, seconds=calibrate_s, seed=seed) for name in names)
            )
            grids = _calibration(names, [_steps(traces, name) for name in names])
            spec = _cluster_spec(probed, grids, device, router_s=0.0)
            async with AsyncClient(cluster.router.address, retry=NO_RETRY) as client:
                # How much they disturb each other depends on how busy they are: traffic of other lengths tells.
                rate = _rates(spec, input_len, output_len, [_CALIBRATED_AT])[0]
                sent, records = await _send_mixed(client, rate, input_len, output_len, num_requests, seed + 1)
                calibration = _calibration(names, [_steps(traces, name) for name in names])
                bare = _cluster_spec(probed, calibration, device, router_s=0.0)
                router_s = _router_seconds(bare, sent, records)
                spec = _cluster_spec(probed, calibration, device, router_s)
                rates = _rates(spec, input_len, output_len, utilisations)
                predicted = {rate: _predict(spec, rate, input_len, output_len, num_requests, seed) for rate in rates}
                predictions_file.write_text(json.dumps(predicted, indent=1))
                measured = {
                    rate: await _measure(client, rate, input_len, output_len, num_requests, seed) for rate in rates
                }
    bounds = _BOUNDS[device]
    rows = _compare(rates, utilisations, predicted, measured)
    _print(rows, bounds, calibration, router_s, predictions_file)
    if json_file is not None:
        figures: dict[str, Any] = {
            "model": model,
            "device": device,
            "workers": list(names),
            "input_len": input_len,
            "output_len": output_len,
            "num_requests": num_requests,
            "seed": seed,
            "router_s": router_s,
            "calibration": asdict(calibration),
            "rows": rows,
            "measured": {rate: [asdict(record) for record in found] for rate, found in measured.items()},
        }
        write_json(json_file, figures)
    return int(any(abs(row["error"]) > bounds[row["percentile"]] for row in rows))


def _calibration(names: Sequence[str], records: Sequence[list[StepRecord]]) -> Calibration:
    """Prefill as the first worker does it, decode as the last one does."""
    kinds = (("prefill", names[0], records[0]), ("decode", names[-1], records[-1]))
    return merge_calibrations(
        [
            calibrate([step for step in steps if step.kind == kind], source=f"{name}'s steps")
            for kind, name, steps in kinds
        ]
    )


def _steps(traces: Path, name: str) -> list[StepRecord]:
    """What a worker recorded so far: the grids and the traffic."""
    return read_records(sorted(traces.glob(f"{name}-*.jsonl")))


async def _send_mixed(
    client: AsyncClient, rate: float, input_len: int, output_len: int, num_requests: int, seed: int
) -> tuple[list[SimRequest], list[RequestRecord]]:
    """Traffic of lengths from a third to the double of those that will be predicted; what was sent, and met."""
    model, rng = (await client.models())[0], random.Random(seed)
    sent, requests = [], []
    for at_s in islice(poisson_arrivals(rate, seed), num_requests):
        isl = rng.randint(input_len // 3 + 1, input_len * 2 - input_len // 3)
        osl = rng.randint(output_len // 3 + 2, output_len * 2 - output_len // 3)
        sent.append(SimRequest(arrival_s=at_s, isl=isl, osl=osl))
        prompt = rng.choices(range(model.vocab_size), k=isl)
        requests.append(LoadRequest(prompt=prompt, max_tokens=osl, at_s=at_s))
    return sent, await run_load(client, requests, _options())


def _router_seconds(spec: ClusterSpec, sent: list[SimRequest], records: list[RequestRecord]) -> float:
    """What router, RPCs and client add to a first token.

    Of requests that waited for nobody, what their prefill leaves unexplained. Those that waited would tell how the
    waiting differs from the simulated, which grows with the load and is no constant. A colocated worker always has a
    step under way, for whose end everybody waits: there it is the difference of the medians.
    """
    simulated = simulate(spec, sent)
    if spec.prefill is None:
        seen = [record.ttft_s for record in records if record.ttft_s is not None]
        return max(0.0, statistics.median(seen) - float(simulated.percentile("ttft", 50)))
    unexplained = [
        record.ttft_s - float(ttft_s)
        for record, ttft_s, queue_s in zip(records, simulated.ttft_s, simulated.queue_s, strict=True)
        if record.ttft_s is not None and queue_s < _NO_QUEUE_S
    ]
    return max(0.0, statistics.median(unexplained))


def _cluster_spec(probed: Sequence[Probed], calibration: Calibration, device: Device, router_s: float) -> ClusterSpec:
    on_gpu = device == "cuda"

    def pool(of: Probed) -> PoolSpec:
        worker = WorkerSpec(
            latency=calibration.latency,
            num_blocks=of.status.num_blocks,
            block_size=of.info.block_size,
            max_step_tokens=of.info.max_step_tokens,
            max_running=256 if on_gpu else 64,
            max_packed_tokens=GPU_PACKED_TOKENS if on_gpu else None,
        )
        return PoolSpec(worker=worker, num_workers=1)

    bandwidth, latency_s = link_bandwidth(_LINKS[device])
    return ClusterSpec(
        prefill=pool(probed[0]) if len(probed) > 1 else None,
        decode=pool(probed[-1]),
        kv_bytes_per_token=probed[0].info.kv_bytes_per_token,
        link_bytes_per_s=bandwidth,
        link_latency_s=latency_s,
        router_s=router_s,
        prefix_cache=False,
    )


def _rates(spec: ClusterSpec, input_len: int, output_len: int, utilisations: list[float]) -> list[float]:
    """Requests/s at which the busier pool has each utilisation."""
    at_one = Load.of(_requests([0.0, 1.0], input_len, output_len), prefix_cache=False)
    rates = []
    for wanted in utilisations:
        low, high = 0.0, 1000.0
        for _ in range(40):
            middle = (low + high) / 2
            found = estimate(spec, at_one.at(middle))
            busy = max(found.utilisation.values())
            low, high = (middle, high) if busy < wanted and not found.binding else (low, middle)
        rates.append(round(low, 3))
    return rates


def _requests(arrivals: list[float], input_len: int, output_len: int) -> list[SimRequest]:
    return [SimRequest(arrival_s=at_s, isl=input_len, osl=output_len) for at_s in arrivals]


def _predict(
    spec: ClusterSpec, rate: float, input_len: int, output_len: int, num_requests: int, seed: int
) -> dict[str, dict[int, float]]:
    arrivals = list(islice(poisson_arrivals(rate, seed), num_requests))
    result = simulate(spec, _requests(arrivals, input_len, output_len), seed=seed)
    return {name: {p: result.percentile(name, p) for p in _PERCENTILES} for name in ("ttft", "tpot")}


async def _measure(
    client: AsyncClient, rate: float, input_len: int, output_len: int, num_requests: int, seed: int
) -> list[RequestRecord]:
    model = (await client.models())[0]
    workload = random_workload(
        poisson_arrivals(rate, seed), num_requests=num_requests, input_len=input_len, output_len=output_len, seed=seed
    )
    return await run_load(client, workload.make(model), _options())


def _options() -> RequestOptions:
    return {"timeout_s": 600.0}


def _compare(
    rates: list[float],
    utilisations: list[float],
    predicted: dict[float, dict[str, dict[int, float]]],
    measured: dict[float, list[RequestRecord]],
) -> list[dict[str, Any]]:
    rows = []
    for rate, utilisation in zip(rates, utilisations, strict=True):
        finished = [record for record in measured[rate] if record.error is None]
        for name in ("ttft", "tpot"):
            values = [value for record in finished if (value := getattr(record, f"{name}_s")) is not None]
            for p in _PERCENTILES:
                foreseen, seen = predicted[rate][name][p], percentile(values, p)
                rows.append(
                    {
                        "rate": rate,
                        "utilisation": utilisation,
                        "quantity": name,
                        "percentile": p,
                        "predicted_s": foreseen,
                        "measured_s": seen,
                        "error": foreseen / seen - 1,
                        "finished": len(finished),
                    }
                )
    return rows


def _print(
    rows: list[dict[str, Any]], bounds: dict[int, float], calibration: Calibration, router_s: float, predictions: Path
) -> None:
    console = Console()
    table = Table(title="Predicted and measured, ms", title_justify="left", header_style="bold")
    for name in ("requests/s", "utilisation", "", "predicted", "measured", "error", "bound"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row['rate']:.2f}",
            f"{row['utilisation']:.0%}",
            f"{row['quantity'].upper()} p{row['percentile']}",
            f"{row['predicted_s'] * 1e3:,.1f}",
            f"{row['measured_s'] * 1e3:,.1f}",
            f"{row['error']:+.1%}",
            f"{bounds[row['percentile']]:.0%}",
        )
    console.print(table)
    console.print(f"{calibration.provenance}; the router adds {router_s * 1e3:.1f} ms; predictions in {predictions}")


if __name__ == "__main__":
    typer.run(main)
