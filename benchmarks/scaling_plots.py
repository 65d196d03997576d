"""Pictures of scaled clusters: requests, workers of each pool and GPUs over time, one column a case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..planner.simulated_scaling import ScalingOutcome
from .scaling_cases import Scenario

_NUM_BINS = 72


def plot(found: Scenario, outcomes: Sequence[tuple[str, ScalingOutcome]], path: Path) -> None:
    """Write a PNG. Raises: ModuleNotFoundError: matplotlib is not installed (the extra `plot`)."""
    import matplotlib  # imported here: the default install does without

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2,
        len(outcomes),
        figsize=(3.4 * len(outcomes), 5.2),
        sharex=True,
        sharey="row",
        layout="constrained",
        squeeze=False,
    )
    for column, (name, outcome) in enumerate(outcomes):
        rate, workers = axes[0][column], axes[1][column]
        arrival_s = outcome.result.arrival_s
        bins = np.linspace(0, float(arrival_s.max()), _NUM_BINS + 1)
        arrived, _ = np.histogram(arrival_s, bins)
        good, _ = np.histogram(arrival_s[outcome.result.met(found.slo)], bins)
        rate.fill_between(bins[:-1], arrived / bins[1], color="lightgrey", step="post", label="arrived")
        rate.fill_between(bins[:-1], good / bins[1], color="tab:green", step="post", alpha=0.6, label="met its limits")
        rate.set_title(name, fontsize=9)
        times = [sample[0] for sample in outcome.samples]
        for index, label in ((1, "prefill"), (2, "decode"), (3, "GPUs held")):
            style = ":" if index == 3 else "-"
            workers.step(times, [sample[index] for sample in outcome.samples], style, where="post", label=label)
        workers.set_xlim(0, bins[-1])
        workers.set_xlabel("s")
    axes[0][0].set_ylabel("requests/s")
    axes[1][0].set_ylabel("ready workers")
    axes[0][0].legend(fontsize=7)
    axes[1][0].legend(fontsize=7)
    figure.suptitle(f"{found.name}, at most {found.max_gpus} GPUs", fontsize=10)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
