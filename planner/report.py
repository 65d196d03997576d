"""A plan on one screen."""

from __future__ import annotations

import math

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .document import bench_command, cluster_text, error_band, warnings
from .outcome import Figures, kv_gigabytes_per_s
from .search import Answer, Plan

_STYLES = {"disaggregate": "bold green", "colocate": "bold yellow", "infeasible": "bold red"}


def render(plan: Plan) -> RenderableType:
    """Verdict, both modes side by side, what would change the answer, and what it rests on."""
    question, load = plan.question, plan.question.load
    limits = [
        f"{name} {limit * 1e3:g} ms"
        for name, limit in (("TTFT", question.slo.ttft_s), ("TPOT", question.slo.tpot_s), ("ITL", question.slo.itl_s))
        if limit is not None
    ]
    asked = (
        f"{question.model.name} {question.dtype}, {load.rate:.4g} requests/s, {load.mean_isl:,.0f} tokens in, "
        f"{load.mean_osl:,.0f} out; "
        + (", ".join(limits) + f" at p{question.slo.percentile:g}" if limits else "no limits")
    )
    parts: list[RenderableType] = [
        Text.assemble((plan.verdict.upper(), _STYLES[plan.verdict]), ": ", plan.reason),
        Text(asked, style="dim"),
    ]
    answers = [("split", plan.disaggregated), ("colocated", plan.colocated)]
    if any(answer for _, answer in answers):
        parts.append(_modes(plan, [(name, answer) for name, answer in answers if answer]))
    if plan.sensitivity:
        parts.append(_sensitivity(plan))
    parts += [Text(f"not possible, {line}", style="red") for line in plan.binding]
    parts += [Text(f"would flip: {line}") for line in plan.flips]
    parts += [Text(f"warning: {line}", style="yellow") for line in warnings(plan)]
    band = error_band(plan)
    parts += [Text(f"latency model, {provenance}", style="dim") for provenance in plan.provenance]
    if plan.chosen:
        parts.append(Text(f"error band: TPOT ±{band['tpot']:.0%}, TTFT ±{band['ttft']:.0%}", style="dim"))
        parts.append(Text.assemble(("would prove it wrong: ", "dim"), bench_command(plan)))
    return Group(*parts)


def _modes(plan: Plan, answers: list[tuple[str, Answer]]) -> Table:
    table = Table(header_style="bold")
    table.add_column("")
    for name, answer in answers:
        table.add_column(name + (" (chosen)" if answer is plan.chosen else ""), justify="right")
    question = plan.question

    def row(name: str, text: list[str]) -> None:
        table.add_row(name, *text)

    row("workers", [cluster_text(answer.candidate) for _, answer in answers])
    chunks = [
        (answer.candidate.prefill or answer.candidate.decode).choice.spec.max_step_tokens for _, answer in answers
    ]
    row("prefill tokens a step", [f"{chunk:,}" for chunk in chunks])
    row("GPUs", [f"{answer.candidate.num_gpus:,}" for _, answer in answers])
    row("cost, $/h", [f"{answer.cost_per_hour:,.2f}" for _, answer in answers])
    row("goodput, requests/s", [f"{answer.outcome.goodput_rps:.2f} of {answer.rate:.2f}" for _, answer in answers])
    per_gpu = [answer.rate * question.load.mean_osl / answer.candidate.num_gpus for _, answer in answers]
    row("tokens/s/GPU", [f"{value:,.0f}" for value in per_gpu])
    for name, figures in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("ITL", "itl_s")):
        row(f"{name} p50 / p90 / p99, ms", [_ms(getattr(answer.outcome, figures)) for _, answer in answers])
    shares = [answer.outcome.utilisation for _, answer in answers]
    row("utilisation", [", ".join(f"{pool} {value:.0%}" for pool, value in share.items()) for share in shares])
    moved = [kv_gigabytes_per_s(answer.candidate, question, answer.rate) for _, answer in answers]
    row("KV moved, GB/s (a link)", [f"{total:.2f} ({each:.2f})" if total else "-" for total, each in moved])
    blocks = [answer.candidate.decode.choice.spec.num_blocks for _, answer in answers]
    row("KV blocks of a decoding worker", [f"{value:,}" for value in blocks])
    row("judged by", [answer.outcome.method for _, answer in answers])
    return table


def _sensitivity(plan: Plan) -> Table:
    percentile = 90.0
    table = Table(title="The chosen cluster under other traffic", title_justify="left", header_style="bold")
    for name in ("", "TTFT p90, ms", "TPOT p90, ms", "highest utilisation", "meets the limits"):
        table.add_column(name, justify="right" if name else "left")
    for row in plan.sensitivity:
        outcome = row.outcome
        table.add_row(
            row.change,
            _one(outcome.ttft_s.get(percentile, math.nan)),
            _one(outcome.tpot_s.get(percentile, math.nan)),
            f"{max(outcome.utilisation.values(), default=0.0):.0%}",
            "yes" if outcome.meets_slo else f"no: {outcome.missed}",
        )
    return table


def _ms(values: Figures) -> str:
    return " / ".join(_one(values.get(percentile, math.nan)) for percentile in (50.0, 90.0, 99.0))


def _one(seconds: float) -> str:
    if math.isinf(seconds):
        return "endless"
    return "-" if math.isnan(seconds) else f"{seconds * 1e3:,.1f}"
