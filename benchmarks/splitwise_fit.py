"""How well does a calibration predict a prompt size that it has not seen? Splitwise's public profiles answer.

The file (MIT) is not part of this repository: docs/planner.md says where to get it.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np

from ..planner.calibration import decode_design, prefill_design
from ..planner.fitting import held_out_errors
from ..planner.traces import data_directory


def splitwise_file() -> Path | None:
    """splitwise_perf_model.csv where public traces lie, if it is there."""
    path = data_directory() / "splitwise_perf_model.csv"
    return path if path.is_file() else None


def splitwise_errors() -> dict[str, float] | None:
    """Mean relative error of prompt time and of token time, one prompt size left out; None without the file.

    Each (model, GPU, tensor-parallel degree) is a worker of its own, as a calibration would see it. Runs of 64 prompts
    on two devices did not fit and ran as fewer at a time, so they are left out.
    """
    path = splitwise_file()
    if path is None:
        return None
    runs: dict[tuple[str, ...], list[tuple[float, float]]] = defaultdict(list)
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["batch_size"] == "64" and row["tensor_parallel"] == "2":
                continue
            key = ("model", "hardware", "tensor_parallel", "prompt_size", "batch_size", "token_size")
            runs[tuple(row[name] for name in key)].append((float(row["prompt_time"]), float(row["token_time"])))
    workers: dict[tuple[str, ...], list[tuple[float, float, float, float, float]]] = defaultdict(list)
    for names, times in runs.items():
        prompt_ms, token_ms = np.median(np.array(times), axis=0)
        prompt, batch, output = map(float, names[3:])
        workers[names[:3]].append((prompt, batch, output, prompt_ms / 1e3, token_ms / 1e3))
    errors: dict[str, list[float]] = defaultdict(list)
    for rows in workers.values():
        prompt, batch, output, prompt_s, token_s = np.array(rows).T
        sizes = prompt.astype(np.int64)
        matrix = prefill_design(batch * prompt, batch * prompt**2 / 2, batch)
        prefill = np.abs(held_out_errors(matrix, prompt_s, sizes, robust=False))
        decode = np.abs(held_out_errors(decode_design(batch, batch * (prompt + output / 2)), token_s, sizes))
        errors["prompt time"].append(float(prefill.mean()))
        errors["prompt time, batch 1"].append(float(prefill[batch == 1].mean()))
        errors["token time"].append(float(decode.mean()))
    return {name: float(np.mean(values)) for name, values in errors.items()}
