"""`splitserve simulate`: tables, files and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from splitserve.cli.main import app
from splitserve.planner.verification import read_prediction
from typer.testing import CliRunner, Result

runner = CliRunner()
LLAMA = ["--model", "llama-3.1-8b", "--gpu", "h200"]
TRAFFIC = ["--isl", "2000:0.5", "--osl", "50", "--rate", "4", "--num-requests", "60"]


def simulate(*flags: str) -> Result:
    return runner.invoke(app, ["simulate", *flags])


def test_split_and_colocated_clusters_are_simulated() -> None:
    split = simulate(*LLAMA, *TRAFFIC, "--prefill", "2", "--decode", "1", "--slo-ttft-ms", "60000")
    assert split.exit_code == 0, split.output
    assert "2 x TP1 h200" in split.stdout
    assert "60 of 60 finished" in split.stdout
    assert "(60 met every SLO)" in split.stdout
    assert "KV moved" in split.stdout
    colocated = simulate(*LLAMA, *TRAFFIC, "--colocated", "2", "--tp", "2")
    assert colocated.exit_code == 0, colocated.output
    assert "2 x TP2 h200" in colocated.stdout
    assert "KV moved" not in colocated.stdout


def test_a_clusters_file_is_taken_and_flags_override_it(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "model: llama-3.1-8b\nengine: {tensor_parallel: 2}\n"
        "prefill: {replicas: 3, gpus: 4}\ndecode: {replicas: 2, gpus: 4, tensor_parallel: 4}\n"
    )
    result = simulate("--cluster", str(path), "--gpu", "h100", *TRAFFIC, "--decode", "5")
    assert result.exit_code == 0, result.output
    assert "3 x TP2 h100" in result.stdout
    assert "5 x TP4 h100" in result.stdout
    path.write_text("router: {policy: no_such_policy}\n")
    refused = simulate("--cluster", str(path), *LLAMA, *TRAFFIC)
    assert refused.exit_code == 2
    assert "router.policy: got 'no_such_policy', wanted one of" in refused.stderr


def test_a_clusters_routing_is_simulated(tmp_path: Path) -> None:
    def routed_by(router: str) -> tuple[list[float], str]:
        path = tmp_path / "cluster.yaml"
        path.write_text(f"prefill: {{replicas: 3}}\nrouter: {router}\n")
        flags = ["--cluster", str(path), "--json", str(tmp_path / "run.json"), *LLAMA, *TRAFFIC, "--rate", "60"]
        result = simulate(*flags)
        assert result.exit_code == 0, result.output
        requests = json.loads((tmp_path / "run.json").read_text())["requests"]
        return [request["ttft_s"] for request in requests], result.stdout

    plain, stdout = routed_by("{}")
    assert "KV moved" in stdout
    assert routed_by("{policy: round_robin}")[0] != plain
    assert "KV moved" not in routed_by("{local_prefill_itl_s: 100}")[1]  # every prompt on its decode worker


def test_the_json_holds_every_request_and_is_a_prediction(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    assert simulate(*LLAMA, *TRAFFIC, "--seed", "3", "--json", str(path)).exit_code == 0
    document = json.loads(path.read_text())
    assert (document["n"], document["num_finished"], document["seed"]) == (60, 60, 3)
    assert len(document["requests"]) == 60
    assert document["rate"] == pytest.approx(4)
    assert read_prediction(path).values["ttft", "p90"] == document["ttft_s"]["p90"]
    again = tmp_path / "again.json"
    simulate(*LLAMA, *TRAFFIC, "--seed", "3", "--json", str(again))
    assert json.loads(again.read_text())["requests"] == document["requests"]


def test_a_trace_is_replayed_and_what_was_done_to_it_is_said(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 3000 * (i // 9), "input_length": 900, "output_length": 9} for i in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = simulate(*LLAMA, "--trace", str(path))
    assert result.exit_code == 0, result.output
    assert "90 of 90 finished" in result.stdout
    assert "timestamps are rounded to 3 s" in result.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*LLAMA, "--isl", "100", "--osl", "10", "--rate", "-2"], "rate is -2"),
        ([*LLAMA, "--isl", "100", "--osl", "10"], "traffic is missing"),
        (["--model", "llama-3.1-8b", "--gpu", "gtx", *TRAFFIC], "gtx"),
        ([*LLAMA, *TRAFFIC, "--prefill", "1", "--decode", "1", "--colocated", "1"], "a simulation is of one kind"),
        ([*LLAMA, "--trace", "missing.jsonl"], "cannot read the trace missing.jsonl"),
        ([*LLAMA, *TRAFFIC, "--json", "/nowhere/run.json"], "its directory does not exist"),
        ([*LLAMA, *TRAFFIC, "--json", "/"], "it is a directory"),
        ([*LLAMA, *TRAFFIC, "--slo-ttft-ms", "nan"], "--ttft-ms is nan; it must be above 0"),
        (["--model", "llama-3.1-70b", "--gpu", "l4", "--tp", "1", *TRAFFIC], "fits on none of the workers"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags: list[str], message: str) -> None:
    result = simulate(*flags)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
