"""The scaling benchmark: what it compares, and that it tells who served how much with how many GPUs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from splitserve.benchmarks.scaling import main
from splitserve.benchmarks.scaling_cases import DAY, cases, load_at, scenario
from splitserve.benchmarks.utilisation_scaling import UtilisationScaling
from splitserve.planner.simulated_scaling import ScalingTimes
from splitserve.scheduling.scaling_signals import ScalingSignals, TrafficSignal, WorkerSignal
from typer.testing import CliRunner


def test_the_day_goes_from_knot_to_knot_and_steps() -> None:
    assert load_at(DAY, 0.0) == load_at(DAY, 0.1) == 0.35
    assert load_at(DAY, 0.275) == pytest.approx((0.35 + 1.0) / 2)
    assert load_at(DAY, 0.45) == 1.0
    assert load_at(DAY, 0.699) == 0.5
    assert load_at(DAY, 0.701) == 0.95
    assert load_at(DAY, 1.0) == 0.35


def signals(at_s: float, prefill: list[float], decode: list[tuple[float, float]]) -> ScalingSignals:
    return ScalingSignals(
        at_s=at_s,
        traffic=TrafficSignal(interval_s=5.0, num_arrived=1, prefill_tokens=1),
        prefill=tuple(
            WorkerSignal(worker=f"p{n}", state="ready", state_s=60.0, busy=busy) for n, busy in enumerate(prefill)
        ),
        decode=tuple(
            WorkerSignal(worker=f"d{n}", state="ready", state_s=60.0, busy=busy, kv_used=kv)
            for n, (busy, kv) in enumerate(decode)
        ),
    )


def test_the_naive_one_follows_utilisation_and_shrinks_late() -> None:
    by_busy = UtilisationScaling("busy", max_workers=20)
    busy = by_busy.decide(signals(0.0, [1.0, 1.0], [(1.0, 0.1)]))
    assert busy.targets == {"prefill": 3, "decode": 2}  # decode workers are always busy
    by_kv = UtilisationScaling("kv", max_workers=20)
    assert by_kv.decide(signals(0.0, [0.7, 0.72], [(1.0, 0.1)] * 4)).targets == {"prefill": 2, "decode": 1}
    idle = [by_busy.decide(signals(at_s, [0.1] * 3, [(0.1, 0.0)] * 2)) for at_s in (60.0, 119.0, 125.0)]
    assert [decision.targets["prefill"] for decision in idle] == [3, 3, 1]


def test_each_case_meets_the_same_traffic_and_those_that_scale_begin_alike() -> None:
    found = scenario("mooncake", max_gpus=6, duration_s=30.0, seed=0)
    compared = cases(found, ScalingTimes())
    scaled = [case for case in compared if case.scaling is not None]
    assert len(scaled) == 3
    assert len({(case.prefill, case.decode) for case in scaled}) == 1
    assert sum(found.planned["peak"]) <= 0.9 * 6
    assert {case.name for case in compared if case.scaling is None} >= {"static, planned for the peak"}


def test_the_report_tells_goodput_and_gpus_of_every_case(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    arguments = ["--trace", "mooncake", "--gpus", "6", "--minutes", "0.5", "--startup", "5"]
    arguments += ["--json", str(tmp_path / "out.json"), "--plot-dir", str(tmp_path)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    (traffic,) = json.loads((tmp_path / "out.json").read_text())["traffics"]
    assert len(traffic["cases"]) == 6
    for case in traffic["cases"]:
        assert case["failed"] == 0
        assert 0 <= case["met"] <= 1
        assert case["goodput_per_gpu"] == pytest.approx(case["goodput_rps"] / case["mean_gpus"])
        assert case["max_gpus"] <= 6
    assert (tmp_path / "scaling_mooncake.png").read_bytes()[:4] == b"\x89PNG"
