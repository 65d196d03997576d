"""The command as a whole: what it imports, how it fails, how it logs."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest
import splitserve
from splitserve.cli import main
from splitserve.client.testing import ScriptedRouter, started, token
from splitserve.proto import inference_pb2 as pb
from typer.testing import CliRunner

runner = CliRunner()


def run_splitserve(*args: str) -> list[str]:
    return [sys.executable, "-c", "from splitserve.cli.main import main; main()", *args]


@pytest.mark.parametrize("args", [["--help"], ["generate", "--help"], ["chat", "--help"], ["bench", "--help"]])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys\n"
        "from splitserve.cli.main import app\n"
        f"try: app({args!r})\n"
        "except SystemExit as exit: print(exit.code)\n"
        "print([name for name in ('torch', 'ray', 'transformers', 'numpy') if name in sys.modules])\n"
        "print('grpc' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    *_, exit_code, heavy, has_grpc = done.stdout.splitlines()
    assert (exit_code, heavy) == ("0", "[]")
    assert has_grpc == str(args != ["--help"])


@pytest.mark.parametrize("name", ["generate", "chat", "bench"])
def test_every_help_has_an_example(name: str) -> None:
    assert f"$ splitserve {name} " in runner.invoke(main.app, [name, "--help"]).output


def test_the_list_of_subcommands_is_the_table() -> None:
    output = runner.invoke(main.app, ["--help"]).output
    assert all(name in output for name in main.SUBCOMMANDS)


def test_version() -> None:
    assert runner.invoke(main.app, ["--version"]).output.strip() == f"splitserve {splitserve.__version__}"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generat"], "Did you mean 'generate'?"),
        (["generate", "a", "--max-tokens", "many"], "--max-tokens"),
        (["generate", "a", "--no-such-flag"], "--no-such-flag"),
    ],
)
def test_a_wrong_flag_exits_2(args: list[str], message: str) -> None:
    result = runner.invoke(main.app, args)
    assert result.exit_code == 2
    assert message in result.stderr


def test_ctrl_c_exits_130_without_a_traceback_and_frees_the_request() -> None:
    async def hang(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        yield token(0)
        await asyncio.Event().wait()

    with ScriptedRouter(hang) as router:
        command = run_splitserve("generate", "a", "--address", router.address)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.read(2) == b"0 "
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=20)
        assert (process.returncode, stderr) == (130, b"")
        assert router.freed.acquire(timeout=5)


def test_logs_are_json_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(main.JsonFormatter())
    logger = logging.Logger("splitserve.test")
    logger.addHandler(handler)
    try:
        raise ValueError("broken")
    except ValueError:
        logger.exception("step %d failed", 3)
    row = json.loads(capsys.readouterr().err)
    assert (row["level"], row["logger"], row["message"]) == ("error", "splitserve.test", "step 3 failed")
    assert "ValueError: broken" in row["traceback"]


@pytest.mark.parametrize(("flags", "level"), [([], "WARNING"), (["-v"], "INFO"), (["-vv"], "DEBUG")])
def test_verbosity_sets_our_loggers_level_only(flags: list[str], level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLITSERVE_ADDRESS", "nowhere")
    logger, root_level = logging.getLogger("splitserve"), logging.getLogger().level
    handlers, before = list(logger.handlers), logger.level
    try:
        runner.invoke(main.app, [*flags, "generate", "a"])
        assert logging.getLevelName(logger.level) == level
        assert logging.getLogger().level == root_level
    finally:
        logger.handlers, logger.level = handlers, before
