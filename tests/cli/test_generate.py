"""`splitserve generate` against a scripted router."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from splitserve.cli.main import app
from splitserve.cli.timeline import spans
from splitserve.client.results import timing_from_proto
from splitserve.client.testing import ScriptedRouter, finished, started, token
from splitserve.core.errors import BY_CODE, EngineFailed
from splitserve.core.state import ClusterState, write_state
from splitserve.proto import inference_pb2 as pb
from typer.testing import CliRunner

runner = CliRunner()

TIMING = pb.RequestTiming(
    queue_s=0.002,
    grant_s=0.003,
    prefill_queue_s=0.005,
    prefill_s=0.060,
    ttft_s=0.070,
    transfer_s=0.050,
    transfer_exposed_s=0.012,
    decode_queue_s=0.010,
    decode_s=0.400,
    e2e_s=0.470,
    kv_bytes=1_234_567,
    transport="shared_memory",
    prefill_worker="prefill-0",
    decode_worker="decode-0",
    attempts=1,
)


async def timed(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
    yield started()
    yield token(0)
    yield finished(num_output_tokens=1, timing=TIMING)


@pytest.mark.parametrize("flag", ["--stream", "--no-stream"])
def test_the_answer_is_printed(router: ScriptedRouter, flag: str) -> None:
    result = runner.invoke(app, ["generate", "hello there", "--max-tokens", "3", flag])
    assert (result.exit_code, result.stdout, result.stderr) == (0, "0 1 2 \n", "")
    assert router.requests[0].text == "hello there"


def test_every_flag_reaches_the_request(router: ScriptedRouter) -> None:
    flags = (
        "--model m --max-tokens 7 --temperature 0.5 --top-k 4 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.1 "
        "--presence-penalty 0.2 --frequency-penalty 0.3 --seed 9 --stop A --stop B --ignore-eos"
    )
    assert runner.invoke(app, ["generate", "a", *flags.split()]).exit_code == 0
    (request,) = router.requests
    assert (request.model, request.max_tokens, list(request.stop), request.ignore_eos) == ("m", 7, ["A", "B"], True)
    expected = pb.SamplingParams(
        temperature=0.5,
        top_k=4,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        seed=9,
    )
    assert request.sampling == expected


@pytest.mark.parametrize("args", [["-"], []])
def test_the_prompt_may_come_from_standard_input(router: ScriptedRouter, args: list[str]) -> None:
    assert runner.invoke(app, ["generate", *args], input="two\nlines ✓\n").exit_code == 0
    assert router.requests[0].text == "two\nlines ✓"


def test_chat_and_system_send_messages(router: ScriptedRouter) -> None:
    runner.invoke(app, ["generate", "hi", "--chat"])
    runner.invoke(app, ["generate", "hi", "--system", "Be brief."])
    sent = [[(turn.role, turn.content) for turn in request.messages.messages] for request in router.requests]
    assert sent == [[("user", "hi")], [("system", "Be brief."), ("user", "hi")]]


def test_json_is_one_object_with_tokens_and_timing() -> None:
    with ScriptedRouter(timed) as router:
        result = runner.invoke(app, ["generate", "a", "--json", "--address", router.address])
    row = json.loads(result.stdout)
    assert (row["text"], row["token_ids"], row["finish_reason"]) == ("0 ", [0], "length")
    assert row["timing"]["kv_bytes"] == 1_234_567
    assert row["ttft_s"] > 0


def test_timing_shows_the_timeline_and_the_bytes() -> None:
    with ScriptedRouter(timed) as router:
        result = runner.invoke(app, ["generate", "a", "--timing", "--address", router.address])
    rows = [[cell.strip() for cell in line.split("│")[1:]] for line in result.stdout.splitlines() if "│" in line]
    shown = {part: duration_ms for part, _, duration_ms, _, _ in rows}
    assert shown == {
        "queue": "2.0",
        "grant": "3.0",
        "prefill queue": "5.0",
        "prefill": "60.0",
        "first token": "",
        "transfer": "50.0",
        "exposed transfer": "12.0",
        "decode queue": "10.0",
        "decode": "400.0",
    }
    assert "1,234,567 bytes by shared_memory" in result.stdout
    assert "prefill prefill-0, decode decode-0" in result.stdout
    assert "50.0 ms, 38.0 of them behind prefill" in result.stdout


def test_a_transfer_that_began_after_prefill_hides_nothing() -> None:
    timing = pb.RequestTiming()
    timing.CopyFrom(TIMING)
    timing.transfer_s, timing.transfer_exposed_s = 0.0009, 0.002

    async def answer(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        yield token(0)
        yield finished(num_output_tokens=1, timing=timing)

    with ScriptedRouter(answer) as router:
        result = runner.invoke(app, ["generate", "a", "--timing", "--address", router.address])
    assert "0.9 ms, 0.0 of them behind prefill" in result.stdout


def test_the_spans_lie_where_they_belong() -> None:
    found = {span.name: (round(span.start_s, 6), span.duration_s) for span in spans(timing_from_proto(TIMING))}
    assert found == {
        "queue": (0.0, 0.002),
        "grant": (0.002, 0.003),
        "prefill queue": (0.005, 0.005),
        "prefill": (0.010, 0.060),
        "first token": (0.070, 0.0),
        "transfer": (0.032, 0.050),
        "exposed transfer": (0.070, 0.012),
        "decode queue": (0.082, 0.010),
        "decode": (0.070, 0.400),
    }


def test_the_local_cluster_is_found_without_an_address(router: ScriptedRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPLITSERVE_ADDRESS")
    write_state(ClusterState(router_addresses=(router.address,), namespace="n", pid=1))
    assert runner.invoke(app, ["generate", "a", "--max-tokens", "2"]).stdout == "0 1 \n"


def test_no_router_at_all_says_what_to_do() -> None:
    result = runner.invoke(app, ["generate", "a"])
    assert result.exit_code == 2
    assert "splitserve up" in result.stderr
    assert "--address" in result.stderr


@pytest.mark.parametrize(
    ("args", "stdin", "message"),
    [
        (["half \udcff"], b"", "not valid Unicode"),
        (["-"], b"caf\xe9", "not valid UTF-8: byte 0xe9 at position 3"),
        ([""], b"", "prompt is empty"),
        (["a", "--temperature", "nan"], b"", "temperature is nan"),
        (["a", "--max-tokens", "0"], b"", "max_tokens is 0"),
        (["a", "--timeout", "nan"], b"", "timeout_s is NaN"),
        (["a", "--address", "nowhere"], b"", "HOST:PORT"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    router: ScriptedRouter, args: list[str], stdin: bytes, message: str
) -> None:
    result = runner.invoke(app, ["generate", *args], input=stdin)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert router.requests == []


def test_the_routers_errors_decide_the_exit_code() -> None:
    async def fail(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        raise BY_CODE[request.text]("what went wrong", retry_after_s=1_000.0)
        yield

    bad_input = {
        "invalid_request",
        "prompt_too_long",
        "model_not_found",
        "model_unsupported",
        "model_load_failed",
        "config_error",
        "address_in_use",
        "idempotency_conflict",
    }
    with ScriptedRouter(fail) as router:
        for code in BY_CODE:
            result = runner.invoke(app, ["generate", code, "--address", router.address])
            assert (result.exit_code, result.stderr) == (2 if code in bad_input else 1, "error: what went wrong\n")


def test_an_unreachable_router_exits_1() -> None:
    with ScriptedRouter() as router:
        address = router.address
    result = runner.invoke(app, ["generate", "a", "--address", address])
    assert result.exit_code == 1
    assert f"no router answers at {address}" in result.stderr


def test_an_error_in_the_middle_starts_its_own_line() -> None:
    async def fail_late(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        if not request.received_token_ids:
            yield token(0)
        raise EngineFailed("the step failed")

    with ScriptedRouter(fail_late) as router:
        result = runner.invoke(app, ["generate", "a", "--address", router.address])
    assert (result.exit_code, result.output) == (1, "0 \nerror: the step failed\n")


def test_output_formats_and_logprobs_reach_the_request(router: ScriptedRouter, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "integer"}')
    for flags in (["--json-schema", str(schema)], ["--regex", "[0-9]+"], ["--logprobs", "2", "--min-tokens", "3"]):
        assert runner.invoke(app, ["generate", "a", *flags]).exit_code == 0
    first, second, third = router.requests
    assert first.output_format.json_schema == '{"type": "integer"}'
    assert second.output_format.regex == "[0-9]+"
    assert (third.logprobs, third.min_tokens) == (2, 3)


def test_a_schema_that_is_not_utf8_is_refused(router: ScriptedRouter, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_bytes(b'{"title": "\xff"}')
    result = runner.invoke(app, ["generate", "a", "--json-schema", str(schema)])
    assert result.exit_code == 2
    assert "schema.json is not valid UTF-8: byte 0xff at position 11" in result.stderr
    assert router.requests == []


def test_logprobs_are_part_of_the_json() -> None:
    async def with_logprobs(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        row = pb.TokenLogprob(token_id=5, logprob=-0.5, rank=1, text=b"\xe2")
        yield started()
        yield pb.GenerateResponse(tokens=pb.Tokens(token_ids=[5], text="", logprobs=[row]))
        yield finished(num_output_tokens=1)

    with ScriptedRouter(with_logprobs) as router:
        done = runner.invoke(app, ["generate", "a", "--json", "--logprobs", "0", "--address", router.address])
    (row,) = json.loads(done.stdout)["logprobs"]
    assert (row["token_id"], row["logprob"], row["text"]) == (5, -0.5, "\ufffd")
