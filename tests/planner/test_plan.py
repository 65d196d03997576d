"""Plans: verdicts, limits, objectives, and the documents that come of them."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from splitserve.core.config import ClusterConfig, load_config
from splitserve.core.errors import ConfigError
from splitserve.planner import Plan, plan
from splitserve.planner.document import bench_command, cluster_yaml, plan_document, warnings, write_candidates
from splitserve.planner.gpus import load_gpu
from splitserve.planner.report import render


@pytest.fixture(scope="module")
def qwen() -> Plan:
    """Judged by simulation; splitting wins."""
    return plan("qwen3-32b", "h100", isl=4000, osl=500, rate=10, num_requests=400, ttft_s=1.0, tpot_s=0.025)


def test_splitting_is_chosen_where_it_is_cheaper(qwen: Plan) -> None:
    assert qwen.verdict == "disaggregate"
    assert qwen.disaggregated is not None
    assert qwen.colocated is not None
    assert qwen.disaggregated.cost_per_hour < qwen.colocated.cost_per_hour
    assert qwen.disaggregated.outcome.method == "simulation"
    for answer in (qwen.disaggregated, qwen.colocated):
        assert answer.outcome.meets_slo
        assert answer.outcome.ttft_s[90.0] <= 1.0
        assert answer.outcome.tpot_s[90.0] <= 0.025


def test_do_not_disaggregate_is_an_answer() -> None:
    found = plan("llama-3.1-8b", "h200", isl=4000, osl=500, rate=2, ttft_s=0.6, tpot_s=0.025, fast=True)
    assert found.verdict == "colocate"
    assert found.reason.startswith("do not disaggregate")
    assert found.chosen is found.colocated
    assert found.chosen is not None
    assert found.chosen.candidate.num_gpus == 1


def test_pools_are_sized_apart(qwen: Plan) -> None:
    assert qwen.disaggregated is not None
    candidate = qwen.disaggregated.candidate
    assert candidate.prefill is not None
    assert candidate.prefill.choice.tp != candidate.decode.choice.tp
    assert candidate.prefill.num_workers != candidate.decode.num_workers


def test_the_cheaper_device_for_each_pool_is_found() -> None:
    found = plan(
        "llama-3.1-8b", ["l40s", "h200"], isl=1000, osl=300, rate=4, ttft_s=1.0, tpot_s=0.05, fast=True, tp=[1]
    )
    assert found.chosen is not None
    assert found.chosen.candidate.decode.choice.gpu.name == "l40s"
    mixed = plan(
        "llama-3.1-8b", "h200", decode_gpu="l40s", isl=1000, osl=300, rate=4, ttft_s=1.0, tpot_s=0.05, fast=True
    )
    assert mixed.disaggregated is not None
    assert mixed.disaggregated.candidate.prefill is not None
    assert mixed.disaggregated.candidate.prefill.choice.gpu.name == "h200"
    assert mixed.disaggregated.candidate.decode.choice.gpu.name == "l40s"


def test_headroom_and_spares_cost_what_they_promise() -> None:
    def cost(**changes: float | bool) -> tuple[float, int]:
        found = plan("llama-3.1-8b", "h100", isl=2000, osl=200, rate=40, ttft_s=0.5, tpot_s=0.02, fast=True, **changes)  # type: ignore[arg-type]
        assert found.disaggregated is not None
        return found.disaggregated.cost_per_hour, found.disaggregated.candidate.num_gpus

    plain, roomy, spare = cost(), cost(headroom=1.0), cost(n_plus_one=True)
    assert roomy[0] > plain[0]
    assert spare[1] >= plain[1] + 2  # one in each pool


def test_most_goodput_uses_the_devices_that_there_are() -> None:
    def goodput(max_gpus: int) -> float:
        found = plan(
            "llama-3.1-8b",
            "h200",
            isl=4000,
            osl=500,
            rate=10,
            ttft_s=0.6,
            tpot_s=0.025,
            objective="goodput",
            max_gpus=max_gpus,
            fast=True,
        )
        assert found.chosen is not None
        assert found.chosen.candidate.num_gpus <= max_gpus
        return found.chosen.outcome.goodput_rps

    assert 1.8 < goodput(8) / goodput(4) < 2.6


def test_a_slow_link_speaks_against_splitting() -> None:
    slow = plan(
        "qwen3-32b", "h100", isl=4000, osl=500, rate=10, ttft_s=1.0, tpot_s=0.025, link="eth10", fast=True, max_gpus=32
    )
    assert slow.verdict == "colocate"
    assert slow.disaggregated is None


def test_flips_name_length_and_bandwidth(qwen: Plan) -> None:
    assert any("colocated with prompts of about" in line for line in qwen.flips)
    assert any("colocated with a link of about" in line for line in qwen.flips)
    steady = plan("llama-3.1-8b", "h200", isl=4000, osl=500, rate=10, ttft_s=0.6, tpot_s=0.025, fast=True)
    assert any("speaks for split" in line or "split with" in line for line in steady.flips)


def test_infeasible_is_an_answer_with_the_binding_constraint() -> None:
    found = plan("llama-3.1-8b", "h200", isl=4000, osl=500, rate=500, ttft_s=0.6, tpot_s=0.025, max_gpus=8, fast=True)
    assert found.verdict == "infeasible"
    assert found.chosen is None
    text = " ".join(found.binding)
    assert "prefill needs" in text
    assert "--max-gpus is 8" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": -1}, "rate is -1"),
        ({"isl": 0}, "0 tokens; it must be at least 1"),
        ({"ttft_s": 0.001}, "--ttft-ms 1 is below the floor: a prompt of 4,000 tokens alone takes"),
        ({"tpot_s": 0.0001}, "--tpot-ms 0.1 is below the floor: one sequence alone takes"),
        ({"tpot_s": -1}, "--tpot-ms is -1000; it must be above 0"),
        ({"isl": 200_000}, "the longest request has 200,500 tokens"),
        ({"gpu": "h300"}, "unknown GPU 'h300'; did you mean h200"),
        ({"model": "llama-3.1-405b", "gpu": "l4"}, "fits on none of the workers for prefill: 8 x l4: 812 GB"),
        ({"engine": "magic"}, "--engine: unknown 'magic'; known: splitserve"),
        ({"tp": [3]}, "32 attention heads do not divide by 3"),
        ({"ttft_s": math.nan}, "--ttft-ms is nan; it must be above 0"),
        ({"itl_s": math.inf}, "--itl-ms is inf; it must be above 0"),
        ({"headroom": math.nan}, "--headroom is nan; it must be a number"),
        ({"headroom": math.inf}, "--headroom is inf"),
        ({"percentile": 100}, "--percentile is 100"),
        ({"percentile": math.nan}, "--percentile is nan"),
        ({"link": "string"}, "--link: 'string' is neither"),
    ],
)
def test_bad_questions_say_what_and_what_to_do(changes: dict[str, object], message: str) -> None:
    asked = {
        "model": "llama-3.1-8b",
        "gpu": "h200",
        "isl": 4000,
        "osl": 500,
        "rate": 10,
        "ttft_s": 0.6,
        "tpot_s": 0.025,
    }
    with pytest.raises(ConfigError) as caught:
        plan(**{**asked, **changes, "fast": True})  # type: ignore[arg-type]
    assert message in caught.value.message


def test_the_document_has_its_stable_keys_and_is_json(qwen: Plan) -> None:
    document = json.loads(json.dumps(plan_document(qwen), allow_nan=False))
    assert document["verdict"] == "disaggregate"
    split = document["disaggregated"]
    assert split["prefill"].keys() >= {"workers", "tp", "gpu"}
    wanted = {"decode", "gpus", "cost_per_hour", "goodput_rps", "kv_gb_per_s", "utilisation"}
    assert split.keys() >= wanted
    for name in ("ttft_s", "tpot_s", "itl_s"):
        assert split[name].keys() >= {"p50", "p90", "p99"}
        assert document["colocated"][name]["p50"] > 0
    assert split["kv_gb_per_s"] == pytest.approx(10 * 4000 * 262_144 / 1e9)
    assert document.keys() >= {"provenance", "error_band", "alternatives", "sensitivity", "flips", "warnings"}
    assert document["alternatives"]


def test_the_cluster_file_is_one_that_up_takes(qwen: Plan, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(cluster_yaml(qwen))
    config = load_config(path, {})
    assert qwen.disaggregated is not None
    assert qwen.disaggregated.candidate.prefill is not None
    assert config.replicas("prefill") == qwen.disaggregated.candidate.prefill.workers
    for role, pool in (
        ("prefill", qwen.disaggregated.candidate.prefill),
        ("decode", qwen.disaggregated.candidate.decode),
    ):
        assert config.pool(role).gpus == config.tensor_parallel(role) == pool.choice.tp  # type: ignore[arg-type]
        assert config.pool(role).accelerator_type is None  # type: ignore[arg-type]
    assert yaml.safe_load(path.read_text())["model"] == "Qwen/Qwen3-32B"
    assert path.read_text().count("#") == 1  # nothing is left to do by hand


def cluster_of(path: Path, gpus: tuple[str, str], **changes: object) -> tuple[ClusterConfig, str]:
    found = plan(
        "llama-3.1-8b",
        gpus[0],
        decode_gpu=gpus[1],
        isl=1000,
        osl=300,
        rate=4,
        ttft_s=1.0,
        tpot_s=0.05,
        fast=True,
        **changes,  # type: ignore[arg-type]
    )
    assert found.disaggregated is not None
    text = cluster_yaml(replace(found, verdict="disaggregate"))
    path.write_text(text)
    return load_config(path, {}), text


def test_the_cluster_file_sends_each_pool_to_its_own_gpus(tmp_path: Path) -> None:
    config, _ = cluster_of(tmp_path / "cluster.yaml", ("h200", "l40s"))
    assert (config.prefill.accelerator_type, config.decode.accelerator_type) == ("H200", "L40S")
    config, text = cluster_of(tmp_path / "cluster.yaml", ("a100-40", "a100-80"))
    assert (config.prefill.accelerator_type, config.decode.accelerator_type) == (None, None)
    assert "# Ray cannot tell a100-40 and a100-80 apart: label the nodes" in text


def test_the_cluster_file_says_what_the_plan_assumes_and_no_key_can(tmp_path: Path) -> None:
    config, text = cluster_of(
        tmp_path / "cluster.yaml", ("h200", "h200"), num_kv_blocks=9000, dtype="fp8", kv_dtype="fp8"
    )
    assert config.engine.num_kv_blocks == 9000
    assert config.engine.dtype is None
    assert "# Weights in fp8 are no setting: serve a checkpoint that is stored so." in text
    assert "# KV in fp8 is no setting, workers keep it in bfloat16: plan with --kv-dtype bfloat16." in text


def test_the_bench_command_repeats_the_traffic(qwen: Plan) -> None:
    words = bench_command(qwen).split()
    assert words[:4] == ["splitserve", "bench", "--rate", "10"]
    assert words[words.index("--input-len") + 1] == "4000"
    assert words[words.index("--slo-ttft-ms") + 1] == "1000"
    traced = replace(qwen, question=replace(qwen.question, traffic_flags=("--trace", "a b.csv")))
    assert bench_command(traced).startswith("splitserve bench --trace 'a b.csv' --slo")
    slower = replace(traced, question=replace(traced.question, trace_rate=5.0))  # 10 requests/s are planned for
    assert "--trace 'a b.csv' --time-scale 0.5 " in bench_command(slower)


def test_every_candidate_is_a_row(qwen: Plan, tmp_path: Path) -> None:
    write_candidates(tmp_path / "all.csv", qwen)
    with (tmp_path / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(qwen.candidates)
    assert {row["mode"] for row in rows} == {"disaggregated", "colocated"}
    assert any(row["ttft_p90_ms"] for row in rows)


def test_one_screen_holds_verdict_provenance_and_error_band(qwen: Plan) -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(render(qwen))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for wanted in ("DISAGGREGATE", "TTFT p50 / p90 / p99", "bandwidth halved", "error band: TPOT", "splitserve bench"):
        assert wanted in text


def test_a_cliff_is_warned_of(qwen: Plan) -> None:
    assert not any("a cliff" in line for line in warnings(qwen))
    assert qwen.disaggregated is not None
    hot = replace(qwen.disaggregated.outcome, utilisation={"prefill": 0.95, "decode": 0.5, "link": 0.8})
    lines = warnings(replace(qwen, disaggregated=replace(qwen.disaggregated, outcome=hot)))
    assert any("prefill is 95% used, a cliff" in line for line in lines)
    assert any("the link is 80% used" in line for line in lines)


def test_a_price_changes_the_choice() -> None:
    cheap = replace(load_gpu("h200"), price_per_hour=0.1)
    found = plan("llama-3.1-8b", ["h100", cheap], isl=1000, osl=100, rate=5, ttft_s=0.5, tpot_s=0.02, fast=True)
    assert found.chosen is not None
    assert found.chosen.candidate.decode.choice.gpu.name == "h200"
