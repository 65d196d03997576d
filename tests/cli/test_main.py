"""The command as a whole: what it imports, how it fails, how it logs."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator

import pytest
import splitserve
from splitserve.cli import main
from splitserve.client.testing import ScriptedRouter, started
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
        (["prefill-worker", "--port", "70000"], "--port"),  # gRPC would listen on 4464
        (["decode-worker", "--port", "-1"], "--port"),
        (["router", "--metrics-port", "65536"], "--metrics-port"),
        (["prefill-worker", "--threads", "0"], "--threads"),
        (["router", "--port", "0", "--prefill", "nowhere"], "a worker's address is 'nowhere'; it must be HOST:PORT"),
        (["router", "--port", "0", "--decode", "127.0.0.1:70000"], "'127.0.0.1:70000'; it must be HOST:PORT"),
    ],
)
def test_a_wrong_flag_exits_2(args: list[str], message: str) -> None:
    result = runner.invoke(main.app, args)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    "args", [["generate", "a"], ["bench", "--concurrency", "1", "--num-requests", "1", "--warmup", "0"]]
)
def test_ctrl_c_exits_130_without_a_traceback_and_frees_the_request(args: list[str]) -> None:
    streaming = threading.Event()

    async def hang(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        streaming.set()
        await asyncio.Event().wait()

    with ScriptedRouter(hang) as router:
        command = run_splitserve(*args, "--address", router.address)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert streaming.wait(timeout=20)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=20)
        assert (process.returncode, stdout) == (130, "")
        assert "Traceback" not in stderr
        assert router.freed.acquire(timeout=30)


@pytest.mark.parametrize(
    ("words", "completed"), [("splitserve gen", "generate"), ("splitserve bench --warm", "--warmup")]
)
def test_the_shell_completes_subcommands_and_flags(words: str, completed: str) -> None:
    variables = {"_SPLITSERVE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    result = runner.invoke(main.app, [], prog_name="splitserve", env=variables)
    assert result.output.split() == [completed]


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


@pytest.mark.parametrize("missing", ["torch", "ray"])
def test_a_missing_extra_is_named_with_the_command_that_brings_it(missing: str) -> None:
    code = (
        "import sys\n"
        "class NotInstalled:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {missing!r}: raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)\n"
        "sys.meta_path.insert(0, NotInstalled())\n"
        "from splitserve.cli.main import main\n"
        "sys.argv = ['splitserve', *sys.argv[1:]]\n"
        "main()"
    )
    command = {"torch": ["decode-worker"], "ray": ["up", "--model", "org/name"]}[missing]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: this needs {missing}, which is not installed; run: pip install 'splitserve[serve]'"
    ]
