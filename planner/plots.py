"""Two curves of a plan: throughput per GPU against tokens/s per user, and time to first token over the rate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .closed_form import estimate
from .search import Plan

_STEPS = 40


def plot(plan: Plan, path: Path) -> None:
    """Write a PNG. Raises: ModuleNotFoundError: matplotlib is not installed (the extra `plot`)."""
    import matplotlib  # imported here: the default install does without

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (trade, first) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    question, load = plan.question, plan.question.load
    for name, answer in (("split", plan.disaggregated), ("colocated", plan.colocated)):
        if answer is None:
            continue
        cluster = answer.candidate.cluster(question)
        rates = [answer.rate * 2 * (step + 1) / _STEPS for step in range(_STEPS)]
        found = [(rate, estimate(cluster, load.at(rate))) for rate in rates]
        stable = [(rate, one) for rate, one in found if not one.binding and math.isfinite(one.ttft_s[90.0])]
        per_gpu = load.mean_osl / answer.candidate.num_gpus
        (line,) = trade.plot(
            [1 / one.tpot_s[50.0] for _, one in stable], [rate * per_gpu for rate, _ in stable], label=name
        )
        first.plot([rate for rate, _ in stable], [one.ttft_s[90.0] * 1e3 for _, one in stable], color=line.get_color())
        marker: dict[str, Any] = {"color": line.get_color(), "marker": "*" if answer is plan.chosen else "o", "s": 90}
        trade.scatter([1 / answer.outcome.tpot_s[50.0]], [answer.rate * per_gpu], **marker)
        first.scatter([answer.rate], [answer.outcome.ttft_s[90.0] * 1e3], **marker)
    trade.set(xlabel="tokens/s of a user", ylabel="tokens/s of a GPU", title=question.model.name)
    first.set(xlabel="requests/s", ylabel="TTFT p90, ms", title="star: chosen; lines: closed form")
    if question.slo.ttft_s is not None:
        first.axhline(question.slo.ttft_s * 1e3, color="grey", linestyle=":")
        first.set_ylim(0, question.slo.ttft_s * 2e3)
    trade.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
