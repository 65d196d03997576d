"""What `splitserve status` and `doctor` show of processes that no router lists, and that they do without them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from splitserve.cli import absent, doctor, status
from splitserve.cli.main import app
from splitserve.client.testing import ScriptedRouter
from splitserve.core.errors import ConfigError, Unavailable
from splitserve.core.state import ClusterState, write_state
from splitserve.deploy.members import ClusterView, Member, Phase
from splitserve.deploy.process import Endpoint
from splitserve.proto import inference_pb2 as pb
from typer.testing import CliRunner, Result

DOWN = (
    Member(name="decode-1", role="decode", phase=Phase.FAILED, reason="rope [linear] is unknown\n  in line 3"),
    Member(name="prefill-0", role="prefill", phase=Phase.WAITING, num_restarts=2, reason="killed by SIGKILL"),
)


class LossyRouter(ScriptedRouter):
    """Remembers how it lost a worker."""

    async def GetRouterStatus(self, request: object, context: object) -> pb.GetRouterStatusResponse:
        lost = pb.WorkerView(worker_id="decode-1", role="decode", state="gone", reason="Socket closed")
        return pb.GetRouterStatusResponse(router_id="router-0", workers=[lost])


@pytest.fixture
def lossy_router() -> Iterator[LossyRouter]:
    with LossyRouter() as running:
        yield running


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def see(monkeypatch: pytest.MonkeyPatch, *members: Member) -> None:
    """The controller tells of these."""
    for command in (status, doctor):
        monkeypatch.setattr(command, "find_view", lambda: ClusterView(members=members, routers=(), ready=True))


def serving(name: str, role: Any, address: str) -> Member:
    endpoint = Endpoint(address=address, metrics_address="", boot_id="", pid=1)
    return Member(name=name, role=role, phase=Phase.READY, endpoint=endpoint)


def test_status_shows_what_does_not_run_and_why(monkeypatch: pytest.MonkeyPatch, lossy_router: LossyRouter) -> None:
    see(monkeypatch, serving("router-0", "router", lossy_router.address), *DOWN)
    monkeypatch.setenv("COLUMNS", "200")
    table = [re.split(" {2,}", line.strip()) for line in run("status").stdout.splitlines()]
    assert table[1:4] == [
        ["router-0", "router", "ready", lossy_router.address],
        ["decode-1", "decode", "failed", "rope [linear] is unknown; see `splitserve logs decode-1`"],
        ["prefill-0", "prefill", "waiting to restart", "killed by SIGKILL"],
    ]
    report = json.loads(run("status", "--json").stdout)
    assert (report["router"], report["workers"][0]["state"]) == (lossy_router.address, "gone")
    assert report["not_running"][0] == {
        "name": "decode-1",
        "role": "decode",
        "state": "failed",
        "reason": "rope [linear] is unknown",
        "num_restarts": 0,
        "log": "splitserve logs decode-1",
    }
    assert report["not_running"][1]["state"] == "waiting to restart"


def test_doctor_says_what_to_do_about_what_stays_down(
    monkeypatch: pytest.MonkeyPatch, lossy_router: LossyRouter
) -> None:
    router = serving("router-0", "router", lossy_router.address)
    unplaced = Member(name="prefill-1", role="prefill", phase=Phase.UNPLACED, reason="no node has 1 GPU")
    see(monkeypatch, router, *DOWN, unplaced)
    result = run("doctor")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "decode-1: it failed and stays down: rope [linear] is unknown; see `splitserve logs decode-1`; `splitserve up` "
        "with a corrected file starts it with that, `splitserve restart decode-1` as it is",
        "prefill-1: it has no place: no node has 1 GPU; it starts as soon as there is one",
    ]
    see(monkeypatch, router)
    assert "decode-1: it does not answer: Socket closed" in run("doctor").stdout  # there is only the router's word


def test_the_only_router_that_is_down_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    down = Member(name="router-0", role="router", phase=Phase.FAILED, reason="the keys are no YAML")
    see(monkeypatch, serving("decode-0", "decode", "127.0.0.1:1"), down)
    table = run("status").stdout
    assert "the keys are no YAML; see `splitserve logs router-0`" in table
    assert "decode-0  decode  ready" in table
    report = json.loads(run("status", "--json").stdout)
    assert (report["router"], report["workers"]) == (None, [])
    assert report["not_running"][0]["name"] == "router-0"
    found = run("doctor")
    assert (found.exit_code, found.stdout.count("router-0: it failed and stays down")) == (1, 1)


def test_a_router_that_is_named_is_asked_alone(monkeypatch: pytest.MonkeyPatch, router: ScriptedRouter) -> None:
    see(monkeypatch, *DOWN)  # SPLITSERVE_ADDRESS names it
    assert "decode-1" not in run("status").stdout
    assert json.loads(run("status", "--json", "--address", router.address).stdout)["not_running"] is None
    assert "decode-1" not in run("doctor").stdout


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ConfigError("no Ray answers at 127.0.0.1:1"), "no Ray answers at 127.0.0.1:1"),
        (Unavailable("the controller is gone"), "the controller is gone"),
        (TimeoutError(), "it does not answer within 5 s"),
        (ModuleNotFoundError("No module named 'ray'", name="ray"), "this needs ray, which is not installed"),
    ],
)
def test_without_its_controller_a_cluster_is_shown_as_its_router_sees_it(
    monkeypatch: pytest.MonkeyPatch, lossy_router: LossyRouter, error: Exception, why: str
) -> None:
    @contextmanager
    def attached() -> Iterator[None]:
        raise error
        yield

    monkeypatch.setattr(absent, "attached", attached)
    write_state(
        ClusterState(router_addresses=(lossy_router.address,), namespace="splitserve", pid=0, ray_address="127.0.0.1:1")
    )
    shown = run("status", "--json")
    assert (shown.exit_code, json.loads(shown.stdout)["router_id"]) == (0, "router-0")
    assert json.loads(shown.stdout)["not_running"] is None
    assert shown.stderr == f"warning: the controller cannot be asked for processes that are down: {why}\n"
