"""Does a request get lost, repeated, changed or stuck, or a block stay behind, whatever dies?

python -m splitserve.benchmarks.chaos --seed 7 --requests 500
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import secrets
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ...engine.testing import make_tiny_model
from ...proto.server import run as run_on_uvloop
from ..report import write_json
from .plan import ChaosPlan, make_plan
from .reference import reference_answers
from .run import chaos_config, run_chaos
from .verdict import fault_times, times_figures, times_table

RATE = 4.0  # requests a second
SECONDS_PER_FAULT = 6.0


def main(
    seed: Annotated[int | None, typer.Option(help="Of requests and faults; a run is repeated with its seed.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests to send at least.")] = 500,
    faults: Annotated[int, typer.Option(min=0, help="Faults to strike.")] = 40,
    seconds: Annotated[
        float | None, typer.Option(help="Over which the faults are spread.", show_default="6 for each")
    ] = None,
    rate: Annotated[float, typer.Option(help="Requests a second.")] = RATE,
    aborts: Annotated[float, typer.Option(min=0, max=1, help="Share of requests whose client goes away.")] = 0.1,
    plan_only: Annotated[bool, typer.Option("--plan", help="Print the plan as JSON and stop.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write plan, verdict and times here.")] = None,
    log_dir: Annotated[
        Path | None, typer.Option(help="Keep the processes' logs and traces here.", show_default="a temporary one")
    ] = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Tell each fault.")] = False,
) -> None:
    """Send requests to a cluster of real processes while they are killed, frozen, slowed, drained and cut off.

    A tiny random model, whose answers are known. Ends with exit code 1 if anything was lost, duplicated, wrong,
    orphaned or hung.

    $ python -m splitserve.benchmarks.chaos --seed 7 --requests 500 --json chaos.json

    $ python -m splitserve.benchmarks.chaos --seed 7 --faults 5 --requests 60
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # or its C core tells each lost connection
    chosen = secrets.randbelow(1 << 32) if seed is None else seed
    spread_s = faults * SECONDS_PER_FAULT if seconds is None else seconds
    plan = make_plan(seed=chosen, seconds=spread_s, rate=rate, num_faults=faults, aborts=aborts)
    console = Console()
    if plan_only:
        console.print_json(data=plan_figures(plan))
        return
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(asctime)s %(message)s")
    console.print(f"seed {chosen}: at least {requests} requests, {faults} faults")
    good = False
    with tempfile.TemporaryDirectory() as temporary:

        async def run() -> None:
            nonlocal good
            good = await _run(plan, requests, log_dir or Path(temporary), json_file, console)

        run_on_uvloop(run())
    raise typer.Exit(0 if good else 1)


async def _run(plan: ChaosPlan, num_requests: int, directory: Path, json_file: Path | None, console: Console) -> bool:
    with console.status("computing the exact answers") as status:
        model = await asyncio.to_thread(make_tiny_model, "llama", directory / "model")
        expected = await reference_answers(model, plan.cases)
        traces = directory / "traces"
        verdict, struck, followed = await run_chaos(
            plan,
            expected,
            num_requests=num_requests,
            config=chaos_config(model, traces),
            log_dir=directory / "logs",
            tell=status.update,
        )
    times = fault_times(struck, followed, traces)
    console.print(times_table(times))
    console.print(verdict.table())
    console.print(
        f"{verdict.requests} requests in {verdict.seconds:.0f} s: {verdict.answered} answered, {verdict.retried} of "
        f"them by another attempt, {verdict.aborted} aborted by their client; {verdict.faults} faults, "
        f"{verdict.corrupted} KV frames changed"
    )
    for complaint in verdict.complaints:
        console.print(f"[red]{complaint}")
    if not verdict.good:
        console.print(f"repeat it with --seed {plan.seed}; what each process said is in its log (--log-dir keeps them)")
    if json_file is not None:
        rows = [dataclasses.asdict(row) for row in struck]
        figures = {"verdict": dataclasses.asdict(verdict), "times": times_figures(times), "struck": rows}
        write_json(json_file, {**figures, "plan": plan_figures(plan)})
    return verdict.good


def plan_figures(plan: ChaosPlan) -> dict[str, object]:
    """The faults and what else makes the requests."""
    return {
        "seed": plan.seed,
        "rate": plan.rate,
        "aborts": plan.aborts,
        "faults": [dataclasses.asdict(fault) for fault in plan.faults],
        "cases": [{"prompt_tokens": len(case.prompt), **case.options} for case in plan.cases],
    }


if __name__ == "__main__":
    typer.run(main)
