"""The controller on a real Ray, with light processes in the place of the roles: start, restart, refusal, the end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from splitserve.core.config import ClusterConfig, Role, load_config
from splitserve.core.errors import SplitserveError
from splitserve.deploy.controller import ClusterView, Controller, MemberFailed, Phase
from splitserve.deploy.process import Endpoint

STAND_IN = str(Path(__file__).with_name("stand_in.py"))

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]


def stand_in(
    config: ClusterConfig, role: Role, *, name: str, host: str, port: int, num_threads: int, http_port: int
) -> Sequence[str]:
    """`model` names the process that must fail, and how: "decode-0:typed"."""
    failing, _, how = config.model.partition(":")
    return [
        *(sys.executable, STAND_IN, role, "--host", host, "--port", str(port)),
        *(("--fail", how) if name == failing else ()),
    ]


def config(**overrides: Any) -> ClusterConfig:
    base = {"router.port": 0, "drain_timeout_s": 5.0, "restart.backoff_s": 0.0, "startup_timeout_s": 30.0}
    return load_config(None, base | {key.replace("__", "."): value for key, value in overrides.items()})


async def until(controller: Controller, condition: Callable[[ClusterView], bool]) -> ClusterView:
    async with asyncio.timeout(60):
        while not condition(controller.view()):
            await asyncio.sleep(0.02)
    return controller.view()


@asynccontextmanager
async def running(cluster: ClusterConfig, log_dir: Path) -> AsyncIterator[Controller]:
    controller = Controller(cluster, log_dir, command=stand_in)
    run = asyncio.create_task(controller.run())
    ready = asyncio.create_task(controller.ready.wait())
    await asyncio.wait({run, ready}, return_when=asyncio.FIRST_COMPLETED)
    try:
        if run.done():
            await run
        yield controller
    finally:
        ready.cancel()
        controller.stop()
        await run


def endpoints(view: ClusterView) -> dict[str, Endpoint]:
    return {member.name: member.endpoint for member in view.members if member.endpoint}


def workers_of(view: ClusterView) -> set[str]:
    return {worker.address for router in view.routers for worker in router.workers}


async def test_everything_starts_is_restarted_and_ends(tmp_path: Path) -> None:
    async with running(config(prefill__replicas=2), tmp_path) as controller:
        before = endpoints(controller.view())
        assert set(before) == {"prefill-0", "prefill-1", "decode-0", "router-0"}
        assert workers_of(controller.view()) == {e.address for name, e in before.items() if name != "router-0"}

        os.kill(before["decode-0"].pid, signal.SIGKILL)
        view = await until(
            controller, lambda view: endpoints(view).get("decode-0", before["decode-0"]) != before["decode-0"]
        )
        after = endpoints(view)
        assert after["decode-0"].boot_id != before["decode-0"].boot_id
        assert after["prefill-0"] == before["prefill-0"]
        await until(controller, lambda view: after["decode-0"].address in workers_of(view))
        assert before["decode-0"].address not in workers_of(controller.view())

        # A router comes back at its old address: clients know no other.
        os.kill(before["router-0"].pid, signal.SIGKILL)
        view = await until(
            controller, lambda view: endpoints(view).get("router-0", before["router-0"]).pid != before["router-0"].pid
        )
        assert endpoints(view)["router-0"].address == before["router-0"].address
        await until(controller, lambda view: len(workers_of(view)) == 3)

    assert {member.phase for member in controller.view().members} == {Phase.STOPPED}
    pids = [endpoint.pid for endpoint in (*before.values(), *after.values())]
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    assert not ray.util.list_named_actors()
    assert (tmp_path / "prefill-0.log").read_text().endswith("drained\n")


async def test_a_lost_actor_takes_its_process_along_and_both_come_back(tmp_path: Path) -> None:
    async with running(config(), tmp_path) as controller:
        before = endpoints(controller.view())["prefill-0"]
        actor = psutil.Process(before.pid).parent()
        assert actor is not None
        child = psutil.Process(before.pid)
        actor.kill()
        await asyncio.to_thread(child.wait, 10)
        view = await until(controller, lambda view: endpoints(view).get("prefill-0", before) != before)
        assert next(m for m in view.members if m.name == "prefill-0").num_restarts >= 1


async def test_restarts_are_bounded(tmp_path: Path) -> None:
    async with running(config(restart__max_restarts=1), tmp_path) as controller:
        for _ in range(2):
            view = await until(controller, lambda view: "prefill-0" in endpoints(view))
            os.kill(endpoints(view)["prefill-0"].pid, signal.SIGKILL)
            await until(controller, lambda view: "prefill-0" not in endpoints(view))
        view = await until(controller, lambda view: view.members[0].phase is Phase.FAILED)
        assert view.members[0].reason == "killed by SIGKILL"
        assert "decode-0" in endpoints(view)


@pytest.mark.parametrize(
    ("how", "message", "tail"),
    [("typed", "cannot listen on 127.0.0.1:1", ""), ("silent", "before it served", "the model file is damaged")],
)
async def test_a_failure_at_start_ends_the_start(tmp_path: Path, how: str, message: str, tail: str) -> None:
    with pytest.raises(MemberFailed, match=f"decode-0 did not start: .*{message}") as failed:
        await Controller(config(model=f"decode-0:{how}"), tmp_path, command=stand_in).run()
    assert tail in failed.value.log_tail
    assert failed.value.log_path == str(tmp_path / "decode-0.log")
    assert not ray.util.list_named_actors()


async def test_what_no_node_has_is_an_error(tmp_path: Path) -> None:
    asked = config(decode__gpus=1, decode__labels={"splitserve/role": "decode"})
    with pytest.raises(
        SplitserveError, match=r"no node has what decode-0 needs \(.*1 GPU, label splitserve/role=decode"
    ):
        await Controller(asked, tmp_path, command=stand_in).run()
