"""Draws what `benchmarks.disaggregation` measured: first tokens and gaps of several clusters under the same loads.

python -m splitserve.benchmarks.disaggregation_plot split.json colocated.json --out split.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

_Load = tuple[int, int, float]
_WIDTH = 0.8  # of all bars of a load


def main(
    runs: Annotated[list[Path], typer.Argument(help="JSON files of runs; the files' names become labels.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("disaggregation.png"),
) -> None:
    """One bar from p50 to p99 for each load and run; a line is the ideal queue's p50, where a run has it."""
    found = {path.stem.replace("_", " "): rows_of(path) for path in runs}
    try:
        draw(found, out)
    except ModuleNotFoundError:
        raise typer.BadParameter("drawing needs matplotlib: pip install 'splitserve[plot]'") from None
    typer.echo(f"wrote {out}")


def rows_of(path: Path) -> dict[_Load, Mapping[str, Any]]:
    """The rows of one run, by their load. Raises: typer.BadParameter: it is no such file."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {(row["input_len"], row["output_len"], row["rate"]): row for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise typer.BadParameter(f"{path} holds no rows of benchmarks.disaggregation: {error!r}") from None


def draw(runs: Mapping[str, Mapping[_Load, Mapping[str, Any]]], path: Path) -> None:
    """Write a PNG. Raises: ModuleNotFoundError: matplotlib is not installed (the extra `plot`)."""
    import matplotlib  # imported here: the default install does without

    matplotlib.use("Agg")
    from matplotlib import pyplot

    loads = list(dict.fromkeys(load for rows in runs.values() for load in rows))
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, name, title in zip(axes, ("ttft", "itl"), ("time to first token", "gap between tokens"), strict=True):
        _bars(axis, runs, loads, name)
        axis.use_sticky_edges = False
        axis.set(yscale="log", ylabel="ms, p50 to p99", title=title)
        axis.set_xticks(range(len(loads)), [f"{isl}/{osl}\n{rate:g}/s" for isl, osl, rate in loads], fontsize=8)
        axis.grid(axis="y", which="both", linewidth=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bars(axis: Any, runs: Mapping[str, Mapping[_Load, Mapping[str, Any]]], loads: Sequence[_Load], name: str) -> None:
    width = _WIDTH / len(runs)
    for number, (label, rows) in enumerate(runs.items()):
        there = [(place, rows[load]) for place, load in enumerate(loads) if load in rows]
        left = [place - _WIDTH / 2 + (number + 0.5) * width for place, _ in there]
        p50, p99 = ([float(row[f"{name}_{q}_ms"]) for _, row in there] for q in ("p50", "p99"))
        heights = [max(top - low, 0.02 * low) for low, top in zip(p50, p99, strict=True)]
        axis.bar(left, heights, width * 0.85, bottom=p50, label=label, color=f"C{number}")
        for x, (_, row) in zip(left, there, strict=True):
            if name == "ttft" and (ideal := row.get("ideal_p50_ms")) is not None:
                axis.hlines(ideal, x - width / 2, x + width / 2, color="black", linewidth=1.2)


if __name__ == "__main__":
    typer.run(main)
