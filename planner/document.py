"""A plan as JSON with stable keys (docs/planner.md), as CSV of all candidates, and as the files that act on it."""

from __future__ import annotations

import csv
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from .candidates import Candidate, Pool
from .jury import Answer
from .outcome import Figures, Outcome, kv_gigabytes_per_s
from .search import Plan

FORMAT = 1
_CLIFF = 0.9  # utilisation from which a little more load means a lot more waiting
_BUSY_LINK = 0.7
_SAME_RATE = 1e-3
_ENGINE_DTYPES = ("float32", "bfloat16", "float16")
# What Ray calls a node's devices in the label ray.io/accelerator-type.
_ACCELERATOR_TYPES: Mapping[str, str] = {
    "a10": "A10",
    "l4": "L4",
    "l40s": "L40S",
    "a100-40": "A100",
    "a100-80": "A100",
    "h100": "H100",
    "h200": "H200",
    "b200": "B200",
    "mi300x": "AMD-Instinct-MI300X-OAM",
}


def plan_document(plan: Plan, *, command: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that the plan says; infinite becomes null."""
    question, load = plan.question, plan.question.load
    document = {
        "format": FORMAT,
        "version": __version__,
        "command": list(command),
        "model": question.model.name,
        "dtype": question.dtype,
        "kv_dtype": question.kv_dtype,
        "traffic": {
            "requests": len(question.requests),
            "rate": load.rate,
            "arrival_cv": load.arrival_cv,
            "mean_isl": load.mean_isl,
            "mean_osl": load.mean_osl,
            "mean_cached": float(load.cached.mean()),
        },
        "slo": {
            "ttft_s": question.slo.ttft_s,
            "tpot_s": question.slo.tpot_s,
            "itl_s": question.slo.itl_s,
            "percentile": question.slo.percentile,
        },
        "objective": question.objective,
        "verdict": plan.verdict,
        "reason": plan.reason,
        "disaggregated": answer_document(plan, plan.disaggregated),
        "colocated": answer_document(plan, plan.colocated),
        "binding": list(plan.binding),
        "flips": list(plan.flips),
        "sensitivity": [{"change": row.change, **outcome_document(row.outcome)} for row in plan.sensitivity],
        "warnings": warnings(plan),
        "provenance": [str(provenance) for provenance in plan.provenance],
        "error_band": error_band(plan),
        "alternatives": [answer_document(plan, answer) for answer in plan.alternatives],
        "bench_command": bench_command(plan) if plan.chosen else None,
    }
    finite: dict[str, Any] = _finite(document)
    return finite


def answer_document(plan: Plan, answer: Answer | None) -> dict[str, Any] | None:
    """One cluster."""
    if answer is None:
        return None
    candidate, question = answer.candidate, plan.question
    total, per_link = kv_gigabytes_per_s(candidate, question, answer.rate)
    if candidate.prefill is None:
        pools: dict[str, Any] = {"workers": _pool(candidate.decode)}
    else:
        pools = {"prefill": _pool(candidate.prefill), "decode": _pool(candidate.decode)}
    return {
        **pools,
        "gpus": candidate.num_gpus,
        "cost_per_hour": candidate.cost_per_hour,
        "rate": answer.rate,
        **outcome_document(answer.outcome),
        "tokens_per_s_per_gpu": answer.rate * question.load.mean_osl / candidate.num_gpus,
        "kv_gb_per_s": total,
        "kv_gb_per_s_per_link": per_link,
    }


def outcome_document(outcome: Outcome) -> dict[str, Any]:
    return {
        "method": outcome.method,
        "meets_slo": outcome.meets_slo,
        "missed": outcome.missed,
        "goodput_rps": outcome.goodput_rps,
        "ttft_s": _percentiles(outcome.ttft_s),
        "tpot_s": _percentiles(outcome.tpot_s),
        "itl_s": _percentiles(outcome.itl_s),
        "utilisation": dict(outcome.utilisation),
        "preemptions": outcome.preemptions,
    }


def error_band(plan: Plan) -> dict[str, float]:
    """The largest mean error of the latency models that the plan rests on."""
    return {
        "tpot": max((p.tpot_error for p in plan.provenance), default=math.nan),
        "ttft": max((p.ttft_error for p in plan.provenance), default=math.nan),
    }


def warnings(plan: Plan) -> list[str]:
    """What the reader should not overlook."""
    answer = plan.chosen
    found = list(plan.question.notes)
    if answer is None:
        return found
    for pool, value in answer.outcome.utilisation.items():
        if pool == "link" and value > _BUSY_LINK:
            found.append(f"the link is {value:.0%} used: transfers wait for each other")
        elif value > _CLIFF:
            found.append(
                f"{pool} is {value:.0%} used, a cliff: a little more load means a lot more waiting, so no percentile "
                "is promised; add a worker or --headroom"
            )
    if answer.outcome.preemptions:
        found.append(f"{answer.outcome.preemptions:,} sequences were preempted: the KV pool is short")
    if any(provenance.layer == "roofline" for provenance in plan.provenance):
        found.append("no measurement stands behind the latency model; run `splitserve calibrate` on a worker")
    if answer.outcome.method == "closed form":
        found.append("by formulas alone; without --fast the cluster is simulated on the traffic")
    return found


def bench_command(plan: Plan) -> str:
    """The command that would prove the chosen cluster wrong."""
    answer, question = plan.chosen, plan.question
    assert answer is not None
    words = ["splitserve", "bench"]
    if question.traffic_flags:
        words += question.traffic_flags
        scale = question.trace_rate / answer.rate if question.trace_rate else 1.0
        if abs(scale - 1) > _SAME_RATE:
            words += ["--time-scale", f"{scale:.4g}"]
    else:
        words += ["--rate", f"{answer.rate:.4g}", "--num-requests", "500"]
        words += ["--input-len", f"{question.load.mean_isl:.0f}", "--output-len", f"{question.load.mean_osl:.0f}"]
    for flag, limit in (("--slo-ttft-ms", question.slo.ttft_s), ("--slo-tpot-ms", question.slo.tpot_s)):
        if limit is not None:
            words += [flag, f"{limit * 1e3:g}"]
    return shlex.join([*words, "--json", "run.json"])


def cluster_yaml(plan: Plan) -> str:
    """The chosen cluster as `splitserve up --config` takes it; spares included."""
    answer, question = plan.chosen, plan.question
    assert answer is not None
    candidate = answer.candidate
    chunk = (candidate.prefill or candidate.decode).choice.spec.max_step_tokens
    tree: dict[str, Any] = {
        "model": question.model.source or question.model.name,
        "engine": {
            "block_size": question.block_size,
            "max_step_tokens": chunk,
            "prefix_cache": question.prefix_cache,
        },
    }
    if question.dtype in _ENGINE_DTYPES:
        tree["engine"]["dtype"] = question.dtype
    for key in ("max_running", "num_kv_blocks"):
        if (stated := getattr(question, key)) is not None:
            tree["engine"][key] = stated
    if candidate.prefill is None:
        tree |= {"prefill": {"replicas": 0}, "decode": {"replicas": 0}, "colocated": _deployed(candidate.decode)}
    else:
        pools = {"prefill": candidate.prefill, "decode": candidate.decode}
        labels = _node_labels(candidate)
        tree |= {role: _deployed(pool) | labels.get(pool.choice.gpu.name, {}) for role, pool in pools.items()}
    head = f"# Made by `splitserve plan` {__version__}: {plan.verdict}, {plan.reason}.\n"
    head += "".join(f"# {line}\n" for line in _not_in_the_file(plan, candidate))
    return head + yaml.safe_dump(tree, sort_keys=False)


def _not_in_the_file(plan: Plan, candidate: Candidate) -> list[str]:
    """What the plan assumes and no key can say."""
    dtype, kv_dtype, found = plan.question.dtype, plan.question.kv_dtype, []
    if dtype not in _ENGINE_DTYPES:
        found.append(f"Weights in {dtype} are no setting: serve a checkpoint that is stored so.")
    kept = dtype if dtype in _ENGINE_DTYPES else "bfloat16"
    if kv_dtype != kept:
        found.append(f"KV in {kv_dtype} is no setting, workers keep it in {kept}: plan with --kv-dtype {kept}.")
    if candidate.prefill is not None and candidate.prefill.choice.gpu != candidate.decode.choice.gpu:
        labels = _node_labels(candidate)
        if not labels:
            names = f"{candidate.prefill.choice.gpu.name} and {candidate.decode.choice.gpu.name}"
            found.append(f"Ray cannot tell {names} apart: label the nodes, and set prefill.labels and decode.labels.")
    return found


def _node_labels(candidate: Candidate) -> dict[str, dict[str, str]]:
    """By device, the key that sends its pool to its nodes; none where the pools' devices, or Ray's names, are alike."""
    devices = {pool.choice.gpu.name for pool in (candidate.prefill, candidate.decode) if pool} - {"cpu"}
    names = {_ACCELERATOR_TYPES.get(device) for device in devices}
    if len(devices) < 2 or None in names or len(names) < 2:
        return {}
    return {device: {"accelerator_type": _ACCELERATOR_TYPES[device]} for device in devices}


def write_candidates(path: Path, plan: Plan) -> None:
    """Every candidate, one a row; latencies where it was judged."""
    judged = {answer.candidate: answer for answer in (plan.disaggregated, plan.colocated, *plan.alternatives) if answer}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        pools = [f"{role}_{name}" for role in ("prefill", "decode") for name in ("gpu", "tp", "workers", "chunk")]
        latencies = [f"{name}_{p}_ms" for name in ("ttft", "tpot", "itl") for p in ("p50", "p90", "p99")]
        writer.writerow(["mode", *pools, "gpus", "cost_per_hour", "meets_slo", "goodput_rps", *latencies])
        for candidate in plan.candidates:
            answer = judged.get(candidate)
            outcome = answer.outcome if answer else None
            row: list[object] = ["colocated" if candidate.prefill is None else "disaggregated"]
            for pool in (candidate.prefill, candidate.decode):
                row += _pool(pool).values() if pool else [""] * 4
            row += [candidate.num_gpus, f"{candidate.cost_per_hour:g}"]
            row += [outcome.meets_slo, f"{outcome.goodput_rps:.3f}"] if outcome else ["", ""]
            for values in (outcome.ttft_s, outcome.tpot_s, outcome.itl_s) if outcome else ({}, {}, {}):
                row += [f"{values[p] * 1e3:.2f}" if p in values else "" for p in (50.0, 90.0, 99.0)]
            writer.writerow(row)


def write_json(path: Path, plan: Plan, *, command: Sequence[str]) -> None:
    path.write_text(json.dumps(plan_document(plan, command=command), indent=1) + "\n", encoding="utf-8")


def cluster_text(candidate: Candidate) -> str:
    """2 x TP1 h200 + 1 x TP2 h200."""
    pools = [pool for pool in (candidate.prefill, candidate.decode) if pool]
    return " + ".join(f"{pool.workers} x TP{pool.choice.tp} {pool.choice.gpu.name}" for pool in pools)


def _pool(pool: Pool) -> dict[str, Any]:
    choice = pool.choice
    return {"gpu": choice.gpu.name, "tp": choice.tp, "workers": pool.workers, "chunk": choice.spec.max_step_tokens}


def _deployed(pool: Pool) -> dict[str, Any]:
    degree = pool.choice.tp
    found = {"replicas": pool.workers, "gpus": 0 if pool.choice.gpu.name == "cpu" else degree}
    return found | ({"tensor_parallel": degree} if degree > 1 else {})


def _percentiles(values: Figures) -> dict[str, float]:
    return {f"p{percentile:g}": value for percentile, value in values.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
