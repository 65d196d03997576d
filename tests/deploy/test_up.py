"""`splitserve up`, `status`, `down` and `demo` as a person runs them: real Ray, real roles, a tiny model."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from splitserve.client import Client
from splitserve.engine.testing import make_tiny_model

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

SPLITSERVE = [sys.executable, "-c", "from splitserve.cli.main import main; main()"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A state file of the test's own; afterwards no process that knows of it is left."""
    values = {"XDG_RUNTIME_DIR": str(tmp_path / "run"), "RAY_AUTH_MODE": "token", "COLUMNS": "200"}
    yield {**os.environ, **values}
    assert not [process.cmdline() for process in belonging_to(tmp_path)]


def belonging_to(directory: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("XDG_RUNTIME_DIR") == str(directory / "run"):
                found.append(process)
        except psutil.Error:  # it ended, or is not ours
            continue
    _, alive = psutil.wait_procs(found, timeout=30)
    return alive


def lose_worker(name: str, directory: Path) -> None:
    """Kill it, and wait until its controller has given it up."""
    (log,) = directory.glob("run/splitserve/logs/*/controller.log")
    pid = re.search(rf"{name} serves at .*, pid (\d+)", log.read_text())
    assert pid is not None
    os.kill(int(pid[1]), signal.SIGKILL)
    while f"{name} killed by SIGKILL; it stays down" not in log.read_text():
        time.sleep(0.05)


def splitserve(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SPLITSERVE, *arguments], env=environment, capture_output=True, text=True, timeout=100, check=False
    )


# Makes the standard streams' terminal its controlling one: only then is Ctrl-C a signal.
_ON_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def start_on_terminal(environment: dict[str, str], arguments: Sequence[str]) -> tuple[subprocess.Popen[bytes], int]:
    """The process, and the terminal it believes to be at; Ctrl-C typed there reaches its whole process group."""
    terminal, inner = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _ON_TERMINAL, *SPLITSERVE, *arguments],
        env=environment,
        stdin=inner,
        stdout=inner,
        stderr=inner,
    )
    os.close(inner)
    return process, terminal


def read_until(terminal: int, text: str) -> str:
    seen = ""
    while text not in seen:
        seen += os.read(terminal, 65_536).decode(errors="replace")
    return seen


def rest_of(terminal: int) -> str:
    seen = ""
    try:
        while chunk := os.read(terminal, 65_536):
            seen += chunk.decode(errors="replace")
    except OSError:  # the other side is closed
        pass
    return seen


def test_a_detached_cluster_serves_and_tells_who_does_not_until_it_is_taken_down(
    environment: dict[str, str], model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("restart: {max_restarts: 0}")
    flags = (str(file), "--port", "0", "--model", str(model), "--kv-memory", "8MiB", "--detach")
    up = splitserve(environment, "up", *flags)
    assert up.returncode == 0, up.stdout + up.stderr

    status = json.loads(splitserve(environment, "status", "--json").stdout)
    assert status["router_id"] == "router-0"
    assert {(w["worker_id"], w["state"]) for w in status["workers"]} == {("prefill-0", "ready"), ("decode-0", "ready")}
    assert status["not_running"] == []
    with Client(status["router"]) as client:
        result = client.generate([5, 6, 7], max_tokens=4, ignore_eos=True)
    assert len(result.token_ids) == 4
    assert result.timing.transport == "shared_memory"

    http = re.search(r"OpenAI API at (http://\S+)/v1", up.stdout)
    assert http is not None
    with urllib.request.urlopen(f"{http[1]}/v1/models") as answer:
        assert json.load(answer)["data"][0]["id"] == str(model)

    unknown = splitserve(environment, "logs", "decode-7")
    assert unknown.returncode == 2
    assert "there is no 'decode-7'; the cluster has controller, decode-0, prefill-0, router-0" in unknown.stderr

    again = splitserve(environment, "up", *flags)
    assert (again.returncode, again.stdout) == (0, "nothing changes\n"), again.stderr

    lose_worker("decode-0", tmp_path)
    commands = [("status", "--json"), ("doctor",), ("up", *flags)]
    with ThreadPoolExecutor() as pool:
        told, doctor, again = pool.map(lambda words: splitserve(environment, *words), commands)
    (lost,) = json.loads(told.stdout)["not_running"]
    assert (lost["name"], lost["state"], lost["reason"]) == ("decode-0", "failed", "killed by SIGKILL")
    assert doctor.returncode == 1
    assert [line[:43] for line in doctor.stdout.splitlines()[1:]] == ["decode-0: it failed and stays down: killed "]
    assert (again.returncode, again.stdout) == (1, "")
    assert "decode-0: failed, killed by SIGKILL; `splitserve restart decode-0` tries again" in again.stderr

    down = splitserve(environment, "down")
    assert (down.returncode, down.stdout) == (0, "the cluster has stopped\n")
    assert splitserve(environment, "down").stdout == "no cluster is running\n"


def test_a_model_that_is_not_there_is_refused_at_once(environment: dict[str, str], tmp_path: Path) -> None:
    for model in (str(tmp_path / "none"), "./none", str(tmp_path / "none.gguf")):
        for flag in ("--dry-run", "--detach"):
            up = splitserve(environment, "up", "--model", model, flag)
            assert (up.returncode, up.stdout) == (2, "")
            assert f"{model} does not exist" in up.stderr
    nobody_knows = splitserve(environment, "up", "--model", "some/model", "--dry-run")  # before it is fetched
    assert nobody_knows.returncode == 0
    assert "would serve some/model" in nobody_knows.stdout


def test_ctrl_c_while_starting_stops_everything(environment: dict[str, str], model: Path) -> None:
    process, terminal = start_on_terminal(environment, ["up", "--port", "0", "--model", str(model)])
    read_until(terminal, "starting")
    read_until(terminal, "prefill-0")
    os.write(terminal, b"\x03")
    assert "everything has stopped" in rest_of(terminal)
    assert process.wait(20) == 0


@pytest.mark.verify
def test_a_failing_worker_ends_the_start_with_its_reason(
    environment: dict[str, str], model: Path, tmp_path: Path
) -> None:
    damaged = shutil.copytree(model, tmp_path / "model")
    for file in damaged.glob("*.safetensors"):
        file.write_bytes(b"{}")
    up = splitserve(environment, "up", "--port", "0", "--model", str(damaged))
    assert up.returncode == 2
    assert re.search(r"(prefill|decode)-0 did not start: cannot load the weights", up.stderr), up.stderr


@pytest.mark.verify
def test_killing_the_front_process_stops_the_cluster(environment: dict[str, str], model: Path) -> None:
    process, terminal = start_on_terminal(environment, ["up", "--port", "0", "--model", str(model)])
    read_until(terminal, "splitserve generate")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "everything has stopped" in rest_of(terminal)


@pytest.mark.verify
def test_demo_answers_every_prompt(environment: dict[str, str]) -> None:
    demo = splitserve(environment, "demo", "--max-tokens", "8")
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert demo.stdout.count("prefill-0") == demo.stdout.count("decode-0") == 8


@pytest.mark.verify
def test_generate_with_local_starts_a_cluster_for_itself(model: Path, environment: dict[str, str]) -> None:
    words = ["generate", "--local", "--model", str(model), "--max-tokens", "3", "--ignore-eos", "--json", "abc"]
    done = splitserve(environment, *words)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 3
    assert "starting one for this command" in done.stderr
