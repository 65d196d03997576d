"""`splitserve bench` against a scripted router: exact counts, files, refusals."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from splitserve.cli.main import app
from splitserve.client import Overloaded
from splitserve.client.testing import ScriptedRouter, count_up
from splitserve.proto import inference_pb2 as pb
from typer.testing import CliRunner

runner = CliRunner()


def test_an_open_loop_run_reports_exact_counts(router: ScriptedRouter, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    flags = "--rate 500 --num-requests 12 --input-len 6 --output-len 4 --warmup 3 --seed 5 --slo-ttft-ms 60000"
    result = runner.invoke(app, ["bench", *flags.split(), "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert "12 of 12 finished" in result.stdout
    assert "(12 met every SLO)" in result.stdout
    assert len(router.requests) == 15
    run = json.loads(path.read_text())
    assert (run["n"], run["seed"], run["warmup"], run["model"]["name"]) == (12, 5, 3, "tiny")
    assert (run["summary"]["num_finished"], run["summary"]["num_met_slo"], run["summary"]["errors"]) == (12, 12, {})
    assert [row["index"] for row in run["requests"]] == list(range(12))
    assert {(row["num_prompt_tokens"], row["num_output_tokens"]) for row in run["requests"]} == {(6, 4)}
    assert run["summary"]["itl_s"]["n"] == 36


def test_the_same_seed_sends_the_same_prompts(router: ScriptedRouter) -> None:
    flags = ["--concurrency", "1", "--num-requests", "3", "--input-len", "5", "--warmup", "0"]
    for seed in ("1", "1", "2"):
        runner.invoke(app, ["bench", *flags, "--seed", seed])
    sent = [tuple(request.token_ids.ids) for request in router.requests]
    assert len(sent) == 9
    assert sent[:3] == sent[3:6] != sent[6:]


def test_failures_are_shown_by_code(tmp_path: Path) -> None:
    async def fail_some(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        if len(router.requests) % 3 == 0:
            raise Overloaded("the queue of 4 is full [wait]")
        async for message in count_up(request):
            yield message

    with ScriptedRouter(fail_some) as router:
        flags = ["--concurrency", "2", "--num-requests", "9", "--input-len", "2", "--output-len", "2", "--warmup", "0"]
        result = runner.invoke(app, ["bench", *flags, "--address", router.address])
    assert result.exit_code == 0
    assert "6 of 9 finished" in result.stdout
    assert "3 x overloaded: the queue of 4 is full [wait]" in result.stdout


def test_a_run_in_which_nothing_finished_exits_1() -> None:
    async def fail(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        raise Overloaded("full")
        yield

    with ScriptedRouter(fail) as router:
        flags = ["--concurrency", "1", "--num-requests", "2", "--warmup", "0"]
        assert runner.invoke(app, ["bench", *flags, "--address", router.address]).exit_code == 1


def test_prompts_and_traces_are_sent(router: ScriptedRouter, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one two\nthree\n")
    flags = ["--concurrency", "1", "--warmup", "0", "--output-len", "2"]
    assert runner.invoke(app, ["bench", "--prompts", str(prompts), *flags]).exit_code == 0
    assert [request.text for request in router.requests] == ["one two", "three"]
    trace = tmp_path / "trace.jsonl"
    row = '{"timestamp": 0, "input_length": 40, "output_length": 3, "hash_ids": [7]}\n'
    trace.write_text(row * 5)
    result = runner.invoke(
        app, ["bench", "--trace", str(trace), "--num-requests", "2", "--max-input-len", "30", "--warmup", "0"]
    )
    assert "2 of 2 finished" in result.stdout
    assert {tuple(request.token_ids.ids) for request in router.requests[2:]} == {
        tuple(router.requests[2].token_ids.ids)
    }
    assert len(router.requests[2].token_ids.ids) == 30


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "nothing sets the pace"),
        ("--rate 1 --concurrency 2", "both set the pace"),
        ("--rate nan", "--rate is nan"),
        ("--rate 0", "--rate is 0"),
        ("--rate inf", "--rate is inf"),
        ("--rate 1 --slo-tpot-ms nan", "--slo-tpot-ms is nan"),
        ("--concurrency 0", "--concurrency is 0"),
        ("--concurrency 1 --num-requests 0", "--num-requests is 0"),
        ("--concurrency 1 --trace a.csv --prompts b.txt", "choose one"),
        ("--trace nowhere.csv", "cannot read nowhere.csv"),
        ("--rate 1 --json /nowhere/run.json", "--json /nowhere/run.json"),
        ("--rate 1 --model other", "the router serves: tiny"),
    ],
)
def test_a_wrong_flag_sends_nothing(router: ScriptedRouter, flags: str, message: str) -> None:
    result = runner.invoke(app, ["bench", *flags.split()])
    assert result.exit_code == 2
    assert message in result.stderr
    assert router.requests == []
