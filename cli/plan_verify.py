"""`splitserve plan verify`: hold a bench result against the plan that foresaw it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..planner.verification import read_history, render, verify


def command(
    result: Annotated[Path, typer.Argument(help="File of `splitserve bench --json`.")],
    prediction: Annotated[
        Path, typer.Option("--plan", help="File of `splitserve plan --json` or `splitserve simulate --json`.")
    ] = Path("plan.json"),
    history: Annotated[
        Path | None, typer.Option(help="JSON lines that verifications are added to.", show_default="beside the plan")
    ] = None,
) -> None:
    """Compare, per percentile, what was measured with what was predicted, and keep a history.

    Exit code 1: a p50 was off by more than 15 % or a p90 by more than 25 %.

    $ splitserve plan verify run.json --plan plan.json
    """
    kept = history or prediction.absolute().with_name("plan-history.jsonl")
    found = verify(result, prediction, history=kept)
    Console().print(render(found, read_history(kept)))
    if not found.held:
        raise typer.Exit(1)
