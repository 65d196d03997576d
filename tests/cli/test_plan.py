"""`splitserve plan` and `plan verify`: the screen, the files, the exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from splitserve.cli.main import app
from typer.testing import CliRunner, Result

runner = CliRunner()
ASKED = ["--model", "qwen3-32b", "--gpu", "h100", "--ttft-ms", "1000", "--tpot-ms", "25"]
TRAFFIC = ["--isl", "4000", "--osl", "500", "--rate", "10"]


def plan(*flags: str) -> Result:
    return runner.invoke(app, ["plan", *flags])


def test_one_screen_and_every_file(tmp_path: Path) -> None:
    files = {name: tmp_path / f"plan.{name}" for name in ("json", "csv", "yaml")}
    flags = ["--json", str(files["json"]), "--csv", str(files["csv"]), "--write-cluster", str(files["yaml"])]
    result = plan(*ASKED, *TRAFFIC, "--fast", *flags)
    assert result.exit_code == 0, result.output
    assert "DISAGGREGATE: split costs" in result.stdout
    assert "would prove it wrong: splitserve bench --rate 10" in result.stdout
    assert json.loads(files["json"].read_text())["verdict"] == "disaggregate"
    assert files["csv"].read_text().startswith("mode,prefill_gpu")
    assert "replicas" in files["yaml"].read_text()


def test_a_trace_is_planned_for_and_simulated(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"{second / 2},{500 + 100 * (second % 7)},{20 + second % 5}" for second in range(80)]
    trace.write_text("timestamp,isl,osl\n" + "\n".join(rows) + "\n")
    flags = ["--model", "llama-3.1-8b", "--gpu", "l40s", "--tp", "1", "--trace", str(trace), "--ttft-ms", "2000"]
    result = plan(*flags, "--rate", "4")
    assert result.exit_code == 0, result.output
    assert "simulation" in result.stdout
    assert "4 requests/s, 800 tokens in, 22 out" in result.stdout
    assert "--time-scale 0.5" in result.stdout.replace("\n", " ")
    document = tmp_path / "plan.json"
    for more, wanted in (
        (["--num-requests", "60"], f"--trace {trace} --num-requests 60 --slo"),
        (["--headroom", "1", "--seed", "3"], f"--trace {trace} --seed 3 --time-scale 0.5 --slo"),
    ):
        assert plan(*flags, *more, "--fast", "--json", str(document)).exit_code == 0
        assert wanted in json.loads(document.read_text())["bench_command"]


def test_infeasible_is_exit_code_3_with_its_constraint() -> None:
    result = plan(*ASKED, "--isl", "4000", "--osl", "500", "--rate", "900", "--fast")
    assert result.exit_code == 3
    assert "INFEASIBLE" in result.stdout
    assert "prefill needs" in result.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*ASKED, "--isl", "4000", "--osl", "500"], "traffic is missing"),
        ([*ASKED, *TRAFFIC[:-1], "-4"], "the rate is -4"),
        ([*ASKED, *TRAFFIC, "--price", "h100=cheap"], "--price: 'h100=cheap' is neither"),
        ([*ASKED, *TRAFFIC, "--calibration", "/nowhere.json"], "--calibration: cannot read /nowhere.json"),
        ([*ASKED, *TRAFFIC, "--json", "/nowhere/plan.json"], "/nowhere/plan.json: its directory does not exist"),
        ([*ASKED, *TRAFFIC, "--json", "/"], "--json /: it is a directory; name a file"),
        ([*ASKED, *TRAFFIC, "--csv", "/"], "--csv /: it is a directory"),
        ([*ASKED, *TRAFFIC, "--tp", "0"], "--tp is 0; it must be at least 1"),
        ([*ASKED, *TRAFFIC, "--gpu", "h300"], "unknown GPU 'h300'"),
        ([*ASKED, "--trace", "/nowhere.csv"], "/nowhere.csv"),
        ([*ASKED, *TRAFFIC, "--trace", "azure"], "both say how long requests are"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags: list[str], message: str) -> None:
    result = plan(*flags)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_damaged_trace_line_is_named(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("timestamp,isl,osl\n" + "0,10,10\n" * 15 + "1,ten,10\n")
    result = plan(*ASKED, "--trace", str(trace))
    assert result.exit_code == 2
    assert f"{trace}, line 17: isl is 'ten'" in result.stderr


def test_a_price_for_every_device_or_for_one() -> None:
    every, one = (plan(*ASKED, *TRAFFIC, "--fast", "--price", price).stdout for price in ("10", "h100=10"))
    assert every == one
    assert "110.00" in one  # 11 devices


def test_the_plot_is_a_png_and_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "plan.png"
    assert plan(*ASKED, *TRAFFIC, "--fast", "--plot", str(file)).exit_code == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    missing = plan(*ASKED, *TRAFFIC, "--fast", "--plot", str(file))
    assert missing.exit_code == 2
    assert "pip install 'splitserve[plot]'" in missing.stderr


def bench_result(path: Path, *, ttft_s: float, tpot_s: float) -> Path:
    def figures(value: float) -> dict[str, float]:
        return {"n": 50, "mean": value, "p50": value, "p90": value * 1.5, "p99": value * 2, "max": value * 2}

    summary = {"num_finished": 50, "max_send_lag_s": 0.0, "ttft_s": figures(ttft_s), "tpot_s": figures(tpot_s)}
    requests = [{"scheduled_s": number / 10} for number in range(50)]
    path.write_text(json.dumps({"summary": summary, "requests": requests, "ended_at": "now"}))
    return path


def test_verify_compares_a_bench_result_and_keeps_a_history(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert plan(*ASKED, *TRAFFIC, "--fast", "--json", str(file)).exit_code == 0
    answer = json.loads(file.read_text())["disaggregated"]
    ttft, tpot = answer["ttft_s"], answer["tpot_s"]
    right = bench_result(tmp_path / "right.json", ttft_s=ttft["p50"], tpot_s=tpot["p50"])
    held = plan("verify", str(right), "--plan", str(file))
    wrong = bench_result(tmp_path / "wrong.json", ttft_s=ttft["p50"] * 3, tpot_s=tpot["p50"])
    missed = plan("verify", str(wrong), "--plan", str(file))
    assert "TTFT" in held.stdout
    assert missed.exit_code == 1
    assert "missed" in missed.stdout
    history = [json.loads(line) for line in (tmp_path / "plan-history.jsonl").read_text().splitlines()]
    assert [Path(row["result"]).name for row in history] == ["right.json", "wrong.json"]
    assert plan("verify", str(file)).exit_code == 2  # no bench result
