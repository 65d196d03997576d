"""A role's process: handshake, typed failures, drain and kill, and death with its parent."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
from splitserve.deploy.process import Endpoint, RoleProcess, StartFailure

STAND_IN = str(Path(__file__).with_name("stand_in.py"))


def stand_in(*arguments: str) -> Sequence[str]:
    return [sys.executable, STAND_IN, "prefill", *arguments]


async def started(process: RoleProcess) -> Endpoint:
    endpoint = await process.start(stand_in(), {"OMP_NUM_THREADS": "3"}, 30.0)
    assert isinstance(endpoint, Endpoint), endpoint
    return endpoint


async def test_start_is_idempotent_and_a_restart_is_another_incarnation(tmp_path: Path) -> None:
    process = RoleProcess(tmp_path / "logs" / "prefill-0.log")
    first = await started(process)
    assert await started(process) == first
    assert "threads=3" in (tmp_path / "logs" / "prefill-0.log").read_text()

    waiting = asyncio.create_task(process.wait())
    os.kill(first.pid, signal.SIGKILL)
    assert str(await waiting) == "killed by SIGKILL"
    assert process.endpoint is None

    second = await started(process)
    assert second.boot_id != first.boot_id
    await process.stop(10.0)
    assert not psutil.pid_exists(second.pid)
    assert (tmp_path / "logs" / "prefill-0.log").read_text().endswith("drained\n")


async def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    process = RoleProcess(tmp_path / "log")
    endpoint = await started(process)
    os.kill(endpoint.pid, signal.SIGSTOP)
    await process.stop(0.2)
    assert not psutil.pid_exists(endpoint.pid)


async def test_a_typed_error_at_start_keeps_its_type(tmp_path: Path) -> None:
    failure = await RoleProcess(tmp_path / "log").start(stand_in("--fail", "typed"), {}, 30.0)
    assert isinstance(failure, StartFailure)
    assert (failure.code, failure.message) == ("address_in_use", "cannot listen on 127.0.0.1:1")


async def test_a_death_before_serving_shows_the_log(tmp_path: Path) -> None:
    failure = await RoleProcess(tmp_path / "log").start(stand_in("--fail", "silent"), {}, 30.0)
    assert isinstance(failure, StartFailure)
    assert "exited with code 1 before it served" in failure.message
    assert "the model file is damaged" in failure.log_tail


async def test_a_process_that_never_serves_is_killed_in_time(tmp_path: Path) -> None:
    failure = await RoleProcess(tmp_path / "log").start(stand_in("--fail", "hang"), {}, 1.0)
    assert isinstance(failure, StartFailure)
    assert "did not serve within 1 s" in failure.message
    assert not [child for child in psutil.Process().children() if STAND_IN in " ".join(child.cmdline())]


async def test_a_cancelled_start_leaves_no_process(tmp_path: Path) -> None:
    before = set(psutil.Process().children())
    task = asyncio.create_task(RoleProcess(tmp_path / "log").start(stand_in("--fail", "hang"), {}, 30.0))
    while not set(psutil.Process().children()) - before:
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert not set(psutil.Process().children()) - before


_PARENT = """
import asyncio, sys
from pathlib import Path
from splitserve.deploy.process import RoleProcess
async def main():
    print((await RoleProcess(Path(sys.argv[1])).start(sys.argv[2:], {}, 30.0)).pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _PARENT, str(tmp_path / "log"), *stand_in()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        child.wait(10)
