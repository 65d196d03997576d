"""What does the planner say to the questions that aiconfigurator was asked, and where do they differ?

python -m splitserve.benchmarks.plan_demo
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..planner import Plan, plan
from ..planner.document import cluster_text
from ..planner.report import render
from ..planner.search import Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """4,000 tokens in, 500 out, bf16; what aiconfigurator 0.12 answers for vLLM, in tokens/s/GPU."""

    model: str
    gpu: str
    ttft_s: float
    tpot_s: float
    colocated: str
    split: str


CASES = (
    Case(
        model="llama-3.1-8b",
        gpu="h200",
        ttft_s=0.6,
        tpot_s=0.025,
        colocated="H200 at 300/10 ms: 1,735; H100 at 600/25: 2,061 (TP1)",
        split="H200 at 300/10 ms: 1,991; H100 at 600/25: 1,838 (2 x TP1 + 1 x TP2)",
    ),
    Case(
        model="qwen3-32b",
        gpu="h100",
        ttft_s=1.0,
        tpot_s=0.025,
        colocated="427 (TP4)",
        split="536 (4 x TP1 + 1 x TP4)",
    ),
)
_MAX_GPUS = 16


def main(rate: Annotated[float, typer.Option(help="Requests a second.")] = 10.0) -> None:
    """Two plans in full, and beside them the most that 16 GPUs can do: aiconfigurator's figures are of that."""
    console = Console()
    for case in CASES:
        asked = {"isl": 4000, "osl": 500, "rate": rate, "ttft_s": case.ttft_s, "tpot_s": case.tpot_s}
        cheapest = plan(case.model, case.gpu, **asked)  # type: ignore[arg-type]
        console.rule(f"{case.model} on {case.gpu}")
        console.print(render(cheapest))
        most = plan(case.model, case.gpu, **asked, objective="goodput", max_gpus=_MAX_GPUS)  # type: ignore[arg-type]
        console.print(_comparison(case, cheapest, most))


def _comparison(case: Case, cheapest: Plan, most: Plan) -> Table:
    table = Table(title="Tokens/s/GPU beside aiconfigurator's", title_justify="left", header_style="bold")
    for name in ("", "for the rate", f"most on {_MAX_GPUS} GPUs", "aiconfigurator 0.12"):
        table.add_column(name)
    for name, ours, best, theirs in (
        ("split", cheapest.disaggregated, most.disaggregated, case.split),
        ("colocated", cheapest.colocated, most.colocated, case.colocated),
    ):
        table.add_row(name, _text(cheapest, ours), _text(most, best), theirs)
    return table


def _text(found: Plan, answer: Answer | None) -> str:
    if answer is None:
        return "not possible"
    per_gpu = answer.rate * found.question.load.mean_osl / answer.candidate.num_gpus
    return f"{per_gpu:,.0f} ({cluster_text(answer.candidate)})"


if __name__ == "__main__":
    typer.run(main)
