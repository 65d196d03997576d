"""`splitserve chat` against a scripted router."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator

from splitserve.cli.main import app
from splitserve.client import Overloaded
from splitserve.client.testing import ScriptedRouter, count_up, started, token
from splitserve.proto import inference_pb2 as pb
from typer.testing import CliRunner

runner = CliRunner()


def _turns(request: pb.GenerateRequest) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in request.messages.messages]


def test_a_conversation_grows_and_resets(router: ScriptedRouter) -> None:
    result = runner.invoke(
        app, ["chat", "--system", "S", "--max-tokens", "2"], input="one\n\ntwo\n/reset\nthree\n/exit\nnever\n"
    )
    assert result.exit_code == 0
    answer = ("assistant", "0 1 ")
    assert [_turns(request) for request in router.requests] == [
        [("system", "S"), ("user", "one")],
        [("system", "S"), ("user", "one"), answer, ("user", "two")],
        [("system", "S"), ("user", "three")],
    ]
    assert result.stdout.count("0 1 ") == 3


def test_the_end_of_input_leaves(router: ScriptedRouter) -> None:
    assert runner.invoke(app, ["chat"], input="").exit_code == 0


def test_an_error_costs_the_turn_and_not_the_conversation() -> None:
    async def fail_first(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        if len(router.requests) == 1:
            raise Overloaded("full", retry_after_s=1_000.0)
        async for message in count_up(request):
            yield message

    with ScriptedRouter(fail_first) as router:
        result = runner.invoke(
            app, ["chat", "--max-tokens", "1", "--address", router.address], input="one\ntwo\n/exit\n"
        )
        assert result.exit_code == 0
        assert "error: full" in result.stderr
        assert _turns(router.requests[1]) == [("user", "two")]


def test_a_script_learns_that_its_last_turn_failed() -> None:
    async def fail_last(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        if len(router.requests) == 2:
            raise Overloaded("full", retry_after_s=1_000.0)
        async for message in count_up(request):
            yield message

    with ScriptedRouter(fail_last) as router:
        result = runner.invoke(app, ["chat", "--max-tokens", "1", "--address", router.address], input="one\ntwo\n")
        assert result.exit_code == 1
        assert "error: full" in result.stderr


def test_a_line_that_is_not_utf8_costs_the_turn_and_not_the_conversation(router: ScriptedRouter) -> None:
    result = runner.invoke(app, ["chat", "--max-tokens", "1"], input=b"o\xffne\ntwo\n")
    assert result.exit_code == 0
    assert "messages.content is not valid Unicode" in result.stderr
    assert [_turns(request) for request in router.requests] == [[("user", "two")]]


def test_ctrl_c_cancels_the_answer_and_goes_on() -> None:
    async def hang_first(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        if len(router.requests) > 1:
            async for message in count_up(request):
                yield message
            return
        yield started()
        yield token(0)
        await asyncio.Event().wait()

    with ScriptedRouter(hang_first) as router:
        command = [sys.executable, "-c", "from splitserve.cli.main import main; main()"]
        with subprocess.Popen(
            [*command, "chat", "--address", router.address, "--max-tokens", "2"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"one\n")
            process.stdin.flush()
            assert process.stdout.read(4) == b"> 0 "
            process.send_signal(signal.SIGINT)
            assert router.freed.acquire(timeout=20)
            stdout, stderr = process.communicate(b"two\n/exit\n", timeout=20)
        assert (process.returncode, stderr) == (0, b"")
        assert b"(cancelled)" in stdout
        assert b"0 1 " in stdout
        assert _turns(router.requests[1]) == [("user", "one"), ("assistant", "0 "), ("user", "two")]
