"""How well does the planner's latency model describe measurements, and which coefficients describe them best?

python -m splitserve.benchmarks.latency_fit --write

Public points are whole closed loops, not single steps: c clients that always have one request open. A time per output
token is then a decode step of c sequences plus the share of the others' prompts; a time to first token is a prefill
plus waiting for slots, steps and prompts ahead. The waiting depends on how each source measured, so its coefficients
are fitted beside those of the step and not shipped.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ..planner.fitting import Array, bootstrap, fit_relative, folds, relative_errors
from ..planner.gpus import load_gpu
from ..planner.latency import (
    DECODE_ROOFLINE,
    DECODE_TERMS,
    PREFILL_ROOFLINE,
    PREFILL_TERMS,
    decode_vector,
    prefill_vector,
)
from ..planner.models import WeightDtype, load_model
from ..planner.terms import Deployment, StepTerms, step_terms
from .report import write_json
from .splitwise_fit import splitwise_errors

_DATA = Path(__file__).parent / "data"
_COEFFICIENTS = Path(__file__).parent.parent / "planner" / "data" / "coefficients.json"
_SYSTEMS = {"h100_sxm": "h100", "h200_sxm": "h200"}
_MODELS = {"nvidia/Llama-3.1-8B-Instruct-FP8": "llama-3.1-8b"}  # others are built-in names
_RESERVED_BYTES = 2e9  # activations and the engine itself
_MEMORY_FRACTION = 0.9
_NUM_WAITS = 8
# The KV dtype is not recorded: with fp8 KV half of the bytes are read, so the floor of that term is half as high.
_DECODE_FLOOR = np.array([0, 1.13, 1.25, 0.56, 0, 0, 0], dtype=float)
_PREFILL_FLOOR = np.array([0, 1.13, 1.25, 1.63, 0, 0, 0], dtype=float)
_FLOOR = np.concatenate([_DECODE_FLOOR, _PREFILL_FLOOR, np.zeros(_NUM_WAITS)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measured closed loop."""

    engine: str
    model: str
    gpu: str
    clients: int
    isl: int
    osl: int
    running: float  # of the clients, those whose KV fits at once
    terms: StepTerms
    ttft_s: float
    tpot_s: float


def read_points(path: Path) -> list[Point]:
    """Points of dense models on the systems that we fit."""
    points = []
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["system"] not in _SYSTEMS:
                continue
            model = load_model(_MODELS.get(row["model_path"], row["model_path"]))
            gpu, tp = load_gpu(_SYSTEMS[row["system"]]), int(row["tp_size"])
            dtype: WeightDtype = "fp8" if "fp8" in (row["precision"], row["gemm_quant_mode"][:3]) else "bfloat16"
            terms = step_terms(Deployment(model=model, gpu=gpu, tp=tp, dtype=dtype, kv_dtype="bfloat16"))
            isl, osl, clients = int(row["isl"]), int(row["osl"]), int(row["batch_size"])
            free = gpu.memory_bytes * _MEMORY_FRACTION - model.weight_bytes(dtype) / tp - _RESERVED_BYTES
            tokens = free / (model.kv_bytes_per_token("bfloat16") * model.kv_copies(tp) / tp)
            points.append(
                Point(
                    engine=row["backend"],
                    model=model.name,
                    gpu=gpu.name,
                    clients=clients,
                    isl=isl,
                    osl=osl,
                    running=max(1.0, min(clients, tokens / (isl + osl / 2))),
                    terms=terms,
                    ttft_s=float(row["silicon_ttft_ms"]) / 1e3,
                    tpot_s=float(row["silicon_tpot_ms"]) / 1e3,
                )
            )
    return points


def tpot_row(point: Point) -> list[float]:
    """A decode step of the running sequences, and each token's share of the other prompts' prefill."""
    running = point.running
    decode = decode_vector(point.terms, running, running * (point.isl + point.osl / 2))
    prefill = prefill_vector(point.terms, point.isl, point.isl**2 / 2)
    share = (running - 1) / point.osl
    return [*decode, *(value * share for value in prefill), *[0.0] * _NUM_WAITS]


def ttft_row(point: Point, tpot_s: float) -> list[float]:
    """A prefill, and what may come before it: the client, a step, a slot, other prompts, all of them at the start."""
    terms, running, isl = point.terms, point.running, point.isl
    prefill = prefill_vector(terms, isl, isl**2 / 2)
    rounds = point.clients / running - 1
    waits = [
        1.0,
        tpot_s,
        rounds * point.osl * tpot_s,
        terms.token_s * isl * running,
        1e-6 * isl * running,
        terms.launch_s * running,
        1e-3 * running,
        terms.token_s * isl * running**0.5,
    ]
    return [*[0.0] * len(DECODE_TERMS), *prefill, *waits]


class ClosedLoopFit:
    """Coefficients of one set of points: the time per token first, since the first token's waits are counted in it."""

    def __init__(self, points: Sequence[Point]) -> None:
        tpot, tpot_s = _tpot(points)
        self._alone = fit_relative(tpot, tpot_s, _FLOOR)
        matrix, target = self.system(points)
        self.coefficients = fit_relative(matrix, target, _FLOOR)

    def system(self, points: Sequence[Point]) -> tuple[Array, Array]:
        """Both kinds of rows, one under the other."""
        tpot, tpot_s = _tpot(points)
        predicted = tpot @ self._alone
        ttft = np.array([ttft_row(point, seconds) for point, seconds in zip(points, predicted, strict=True)])
        return np.vstack([tpot, ttft]), np.concatenate([tpot_s, [point.ttft_s for point in points]])

    def errors(self, points: Sequence[Point]) -> tuple[Array, Array]:
        """Signed relative errors of TPOT and of TTFT."""
        both = relative_errors(*self.system(points), self.coefficients)
        return both[: len(points)], both[len(points) :]

    def interval(self, points: Sequence[Point]) -> tuple[Array, Array]:
        return bootstrap(*self.system(points), _FLOOR)


def _tpot(points: Sequence[Point]) -> tuple[Array, Array]:
    return np.array([tpot_row(point) for point in points]), np.array([point.tpot_s for point in points])


def held_out(points: Sequence[Point], groups: NDArray[np.int64], engine_of: Sequence[str]) -> tuple[Array, Array]:
    """Absolute errors of every point under a fit of its engine's points outside its group; TPOT, TTFT.

    An engine that has no points outside the group is predicted by all engines together.
    """
    tpot, ttft = np.zeros(len(points)), np.zeros(len(points))
    for group in np.unique(groups):
        for engine in sorted(set(engine_of)):
            test = [i for i in range(len(points)) if groups[i] == group and engine_of[i] == engine]
            if not test:
                continue
            seen = [i for i in range(len(points)) if groups[i] != group]
            own = [i for i in seen if engine_of[i] == engine]
            fit = ClosedLoopFit([points[i] for i in own or seen])
            tpot[test], ttft[test] = map(np.abs, fit.errors([points[i] for i in test]))
    return tpot, ttft


def roofline_errors(points: Sequence[Point]) -> tuple[Array, Array]:
    """What the data sheet alone would have said, with no waiting at all."""
    x = np.concatenate([list(asdict(DECODE_ROOFLINE).values()), list(asdict(PREFILL_ROOFLINE).values()), np.zeros(8)])
    tpot, tpot_s = _tpot(points)
    ttft = np.array([ttft_row(point, 0.0) for point in points])
    ttft_s = np.array([point.ttft_s for point in points])
    return np.abs(relative_errors(tpot, tpot_s, x)), np.abs(relative_errors(ttft, ttft_s, x))


def fit_own_engine(path: Path) -> tuple[Array, Array, float, float]:
    """Decode and prefill coefficients of our engine's steps; mean error of each kind, one row left out at a time."""
    model, gpu = load_model("llama-3.1-8b"), load_gpu("h200")
    terms = step_terms(Deployment(model=model, gpu=gpu, tp=1, dtype="bfloat16", kv_dtype="bfloat16"))
    decode, prefill, decode_s, prefill_s = [], [], [], []
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            batch, tokens, seconds = int(row["batch"]), int(row["tokens"]), float(row["seconds"])
            if row["kind"] == "decode":
                decode.append(decode_vector(terms, batch, batch * tokens))
                decode_s.append(seconds)
            else:
                prefill.append(prefill_vector(terms, batch * tokens, batch * tokens**2 / 2, batch))
                prefill_s.append(seconds)
    found = []
    for rows, target, floor in ((decode, decode_s, _DECODE_FLOOR), (prefill, prefill_s, _PREFILL_FLOOR)):
        # The run's own product reached 788 TFLOP/s and its copy 4.26 TB/s: steps end where they cannot be told apart.
        matrix, seconds_of = np.array(rows), np.array(target)
        errors = []
        for held in range(len(target)):
            seen = np.arange(len(target)) != held
            x = fit_relative(matrix[seen], seconds_of[seen], floor * [1, 0.95, 0.95, 0.9, 1, 1, 1], robust=False)
            errors.append(abs(matrix[held] @ x / seconds_of[held] - 1))
        x = fit_relative(matrix, seconds_of, floor * [1, 0.95, 0.95, 0.9, 1, 1, 1], robust=False)
        found.append((x, float(np.mean(errors))))
    return found[0][0], found[1][0], found[0][1], found[1][1]


def main(
    points_file: Annotated[Path, typer.Option("--points", help="Measured closed loops.")] = _DATA
    / "silicon_points.csv",
    write: Annotated[bool, typer.Option(help="Write planner/data/coefficients.json.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Random 5-fold splits to average.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
) -> None:
    """Fit, hold out, print, and on demand write the coefficients that the planner ships."""
    points = read_points(points_file)
    engines = [point.engine for point in points]
    together = ["all"] * len(points)
    figures: dict[str, Any] = {}

    def measure(name: str, errors: Sequence[tuple[Array, Array]]) -> None:
        tpot, ttft = (np.concatenate(kind) for kind in zip(*errors, strict=True))
        figures[name] = {
            "tpot": float(tpot.mean()),
            "tpot_median": float(np.median(tpot)),
            "ttft": float(ttft.mean()),
            "ttft_median": float(np.median(ttft)),
        }

    kinds = np.unique([f"{point.model} {point.gpu}" for point in points], return_inverse=True)[1]
    split = [folds(len(points), 5, seed) for seed in range(repeats)]
    measure("roofline", [roofline_errors(points)])
    per_engine = [held_out(points, fold, engines) for fold in split]
    measure("five_fold", per_engine)
    measure("five_fold_one_fit", [held_out(points, fold, together) for fold in split])
    measure("left_out", [held_out(points, kinds, together)])
    measure("left_out_per_engine", [held_out(points, kinds, engines)])
    splitwise = splitwise_errors()

    shipped: dict[str, Any] = {}
    for engine in sorted(set(engines)):
        own = [i for i, name in enumerate(engines) if name == engine]
        mine = [points[i] for i in own]
        fit = ClosedLoopFit(mine)
        low, high = fit.interval(mine)
        shipped[engine] = _row(
            fit.coefficients,
            source=f"{len(mine)} public {engine} measurements, aiconfigurator-core 0.12.0",
            tpot_error=float(np.mean([tpot[own].mean() for tpot, _ in per_engine])),
            ttft_error=float(np.mean([ttft[own].mean() for _, ttft in per_engine])),
            gpus=sorted({point.gpu for point in mine}),
        )
        shipped[engine]["interval"] = {"low": _named(low), "high": _named(high)}
    decode, prefill, decode_error, prefill_error = fit_own_engine(_DATA / "splitserve_h200.csv")
    # One GPU says nothing about collectives: those of the engine that is most like ours stand in.
    for x, like in ((decode, shipped["vllm"]["decode"]), (prefill, shipped["vllm"]["prefill"])):
        x[4], x[5] = like["collective"], like["collective_bytes"]
    shipped["splitserve"] = _row(
        np.concatenate([decode, prefill]),
        source="splitserve's own steps on one H200 (docs/performance.md), collectives as in vllm",
        tpot_error=decode_error,
        ttft_error=prefill_error,
        gpus=["h200"],
    )
    _print(len(points), figures, shipped, splitwise)
    document = {"errors": figures, "engines": {name: shipped[name] for name in ("splitserve", *sorted(set(engines)))}}
    if write:
        _COEFFICIENTS.write_text(json.dumps(_rounded(document), indent=1) + "\n", encoding="utf-8")
    if json_file is not None:
        write_json(json_file, {**document, "splitwise": splitwise, "num_points": len(points), "repeats": repeats})


def _named(x: Array) -> dict[str, dict[str, float]]:
    count = len(DECODE_TERMS)
    return {
        "decode": dict(zip(DECODE_TERMS, x.tolist(), strict=False)),
        "prefill": dict(zip(PREFILL_TERMS, x[count:].tolist(), strict=False)),
    }


def _row(x: Array, **facts: object) -> dict[str, Any]:
    return {**facts, **_named(x)}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _print(
    num_points: int, figures: dict[str, Any], shipped: dict[str, Any], splitwise: dict[str, float] | None
) -> None:
    console = Console()
    table = Table(title=f"Relative error on {num_points} closed loops, %", title_justify="left", header_style="bold")
    for name in ("", "TPOT mean", "median", "TTFT mean", "median"):
        table.add_column(name, justify="right" if name else "left")
    for name, row in figures.items():
        table.add_row(name, *(f"{100 * row[key]:.1f}" for key in ("tpot", "tpot_median", "ttft", "ttft_median")))
    console.print(table)
    if splitwise is None:
        console.print("splitwise_perf_model.csv: not found; SPLITSERVE_DATA names its directory (docs/planner.md)")
    else:
        facts = ", ".join(f"{name} {100 * error:.1f} %" for name, error in splitwise.items())
        console.print(f"splitwise_perf_model.csv, one prompt size left out: {facts}")
    for part, terms in (("decode", DECODE_TERMS), ("prefill", PREFILL_TERMS)):
        table = Table(title=f"Times the ideal seconds, {part}", title_justify="left", header_style="bold")
        for name in ("", *terms):
            table.add_column(name, justify="right" if name else "left")
        for engine, row in shipped.items():
            table.add_row(engine, *(f"{row[part][term]:.2f}" for term in terms))
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
