"""The controller on a real Ray, with light processes in the place of the roles: start, restart, refusal, the end."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest
import ray
from splitserve.core.config import ClusterConfig
from splitserve.core.errors import ConfigError, SplitserveError, Unavailable
from splitserve.deploy.controller import Controller
from splitserve.deploy.members import ClusterView, MemberFailed, Phase
from splitserve.deploy.scaler import Scaling, replay_log
from splitserve.deploy.worker_admin import switch_worker

from .stand_in_roles import config, endpoints, running, scaled_config, scaling_log, stand_in, until, workers_of

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(400)]


def size_of(view: ClusterView, role: str) -> int:
    return next(pool.ready for pool in view.pools if pool.role == role)


def phase_of(view: ClusterView, name: str) -> Phase | None:
    return next((member.phase for member in view.members if member.name == name), None)


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


async def test_a_router_that_stays_down_ends_the_cluster_only_if_it_is_the_last(tmp_path: Path) -> None:
    async def lose_both() -> None:
        async with running(config(router__replicas=2, restart__max_restarts=0), tmp_path) as controller:
            before = endpoints(controller.view())
            os.kill(before.pop("router-1").pid, signal.SIGKILL)
            view = await until(controller, lambda view: phase_of(view, "router-1") is Phase.FAILED)
            assert endpoints(view) == before
            os.kill(before["router-0"].pid, signal.SIGKILL)
            await controller.stopping.wait()

    with pytest.raises(Unavailable, match="router-0 killed by SIGKILL and stays down after 0 restarts"):
        await lose_both()


async def test_the_only_router_waits_for_settings_with_which_it_serves(tmp_path: Path) -> None:
    async with running(config(restart__max_restarts=0), tmp_path) as controller:
        before = endpoints(controller.view())
        router = before.pop("router-0")
        controller.apply(config(restart__max_restarts=0, model="router-0:silent"))
        view = await until(controller, lambda view: phase_of(view, "router-0") is Phase.FAILED)
        assert endpoints(view) == before
        controller.apply(config(restart__max_restarts=0))
        after = endpoints(await until(controller, lambda view: view.settled))
        assert after.pop("router-0").address == router.address
        assert after == before


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
        SplitserveError,
        match=r"no node has what decode-0 needs \(.*1 GPU, label splitserve/role=decode\): "
        r"[\d.]+ has 0 of 1 GPU, no label splitserve/role\. Add such a node",
    ):
        await Controller(asked, tmp_path, command=stand_in).run()


@pytest.mark.verify
async def test_pools_grow_and_shrink_and_new_settings_are_rolled_out(tmp_path: Path) -> None:
    async with running(config(prefill__replicas=2), tmp_path) as controller:
        first = endpoints(controller.view())
        controller.apply(controller.config.scaled({"prefill": 1, "decode": 2}))
        assert not controller.view().settled
        view = await until(controller, lambda view: view.settled)
        grown = endpoints(view)
        assert set(grown) == {"prefill-0", "decode-0", "decode-1", "router-0"}
        assert (grown["prefill-0"], grown["decode-0"]) == (first["prefill-0"], first["decode-0"])
        assert not psutil.pid_exists(first["prefill-1"].pid)
        assert [(pool.role, pool.wanted, pool.ready) for pool in view.pools] == [("prefill", 1, 1), ("decode", 2, 2)]

        # The only prefill worker gets a successor before it goes; the file leaves the size of scaled pools alone.
        controller.apply(config(prefill__env={"COLOUR": "blue"}))
        view = await until(controller, lambda view: view.settled)
        renewed = endpoints(view)
        assert set(renewed) == {"prefill-1", "decode-0", "decode-1", "router-0"}
        assert {name: renewed[name] for name in ("decode-0", "decode-1", "router-0")} == {
            name: grown[name] for name in ("decode-0", "decode-1", "router-0")
        }
        assert psutil.Process(renewed["prefill-1"].pid).environ()["COLOUR"] == "blue"

        controller.drain("decode-1", restart=True)
        again = endpoints(await until(controller, lambda view: view.settled))
        assert again["decode-1"].pid != grown["decode-1"].pid
        assert again["decode-0"] == grown["decode-0"]
        controller.drain("decode-0", restart=False)
        assert set(endpoints(await until(controller, lambda view: view.settled))) == {
            "prefill-1",
            "decode-1",
            "router-0",
        }
        with pytest.raises(ConfigError, match=r"there is no 'decode-7'; the cluster has decode-1, prefill-1, router-0"):
            controller.drain("decode-7", restart=True)
    assert not ray.util.list_named_actors()


async def test_the_successor_of_a_pools_only_worker_outlives_other_changes(tmp_path: Path) -> None:
    async with running(config(), tmp_path) as controller:
        before = endpoints(controller.view())
        held = tmp_path / "held"
        os.mkfifo(held)
        controller.apply(config(prefill__env={"STARTS_AFTER": str(held)}))
        await until(controller, lambda view: phase_of(view, "prefill-1") is Phase.STARTING)
        controller.apply(controller.config.scaled({"decode": 2}))
        view = await until(controller, lambda view: size_of(view, "decode") == 2)
        assert phase_of(view, "prefill-1") is Phase.STARTING
        assert [(pool.role, pool.wanted, pool.ready) for pool in view.pools] == [("prefill", 1, 1), ("decode", 2, 2)]
        assert endpoints(view)["prefill-0"] == before["prefill-0"]
        writer = os.open(held, os.O_RDWR)
        view = await until(controller, lambda view: view.settled)
        os.close(writer)
        assert set(endpoints(view)) == {"prefill-1", "decode-0", "decode-1", "router-0"}
        assert endpoints(view)["decode-0"] == before["decode-0"]


async def test_settings_that_do_not_serve_cost_one_process_until_they_are_corrected(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def cluster(**overrides: object) -> ClusterConfig:
        return config(decode__replicas=2, restart__max_restarts=0, **overrides)

    broken = {"FAILS": "silent"}
    async with running(cluster(), tmp_path) as controller:
        before = endpoints(controller.view())

        # The successor of the only prefill worker fails: nothing else is touched.
        controller.apply(cluster(prefill__env=broken, decode__env=broken))
        await until(controller, lambda view: "prefill-1 does not serve with new settings" in caplog.text)
        view = controller.view()
        assert (phase_of(view, "prefill-1"), endpoints(view)) == (Phase.FAILED, before)
        assert "before it served" in next(m.reason for m in view.members if m.name == "prefill-1")
        assert [(pool.wanted, pool.ready) for pool in view.pools] == [(1, 1), (2, 2)]

        # The prefill pool's are corrected: the first decode worker fails, the second one keeps what it has.
        controller.apply(cluster(prefill__env={"COLOUR": "blue"}, decode__env=broken))
        await until(controller, lambda view: "decode-0 does not serve with new settings" in caplog.text)
        view = controller.view()
        (prefill,) = (name for name in endpoints(view) if name.startswith("prefill"))
        assert psutil.Process(endpoints(view)[prefill].pid).environ()["COLOUR"] == "blue"
        assert phase_of(view, "decode-0") is Phase.FAILED
        assert endpoints(view)["decode-1"] == before["decode-1"]

        # Nor is it touched when something else changes.
        controller.apply(controller.config.scaled({"prefill": 2}))
        view = await until(controller, lambda view: size_of(view, "prefill") == 2)
        assert (phase_of(view, "decode-1"), endpoints(view)["decode-1"]) == (Phase.READY, before["decode-1"])

        controller.apply(cluster(prefill__env={"COLOUR": "blue"}, decode__env={"COLOUR": "red"}))
        after = endpoints(await until(controller, lambda view: view.settled))
        assert set(after) == {*endpoints(view), "decode-0"}
        assert after[prefill] == endpoints(view)[prefill]
        assert {psutil.Process(after[name].pid).environ()["COLOUR"] for name in ("decode-0", "decode-1")} == {"red"}


async def test_a_roll_out_that_ended_does_not_go_on_in_another_pool_by_itself(tmp_path: Path) -> None:
    def cluster(**overrides: object) -> ClusterConfig:
        return config(prefill__replicas=2, decode__replicas=2, restart__max_restarts=0, **overrides)

    async with running(cluster(), tmp_path) as controller:
        before = endpoints(controller.view())
        broken = {"FAILS": "silent"}
        controller.apply(cluster(prefill__env=broken, decode__env=broken))
        await until(controller, lambda view: phase_of(view, "prefill-0") is Phase.FAILED)
        await until(controller, lambda _: controller._rolling is not None and controller._rolling.done())
        controller.apply(controller.config.scaled({"decode": 2}))  # as it was
        await until(controller, lambda _: controller._rolling is not None and controller._rolling.done())
        del before["prefill-0"]
        assert endpoints(controller.view()) == before


@pytest.mark.verify
async def test_a_worker_that_hangs_is_killed_and_started_again(tmp_path: Path) -> None:
    async with running(config(restart__unhealthy_s=3.0), tmp_path) as controller:
        before = endpoints(controller.view())["decode-0"]
        os.kill(before.pid, signal.SIGSTOP)
        view = await until(controller, lambda view: endpoints(view).get("decode-0", before) != before)
        assert not psutil.pid_exists(before.pid)
        await until(controller, lambda view: view.settled)
        assert next(m for m in view.members if m.name == "decode-0").num_restarts == 1


@pytest.mark.verify  # test_load_step.py has it with real workers
async def test_a_pool_grows_with_its_load_and_shrinks_after_it(tmp_path: Path) -> None:
    load = tmp_path / "load"
    cluster = scaled_config(load, scaling={"role_switch": False})
    async with running(cluster, tmp_path) as controller:
        view = await until(controller, lambda view: view.settled and size_of(view, "prefill") > 1)
        assert size_of(view, "decode") == 1  # nobody waits for it
        load.unlink()
        view = await until(controller, lambda view: view.settled and size_of(view, "prefill") == 1)
        assert size_of(view, "decode") == 1
    assert replay_log(scaling_log(tmp_path), controller.config)[1] == []


@pytest.mark.parametrize("refused", [False, pytest.param(True, marks=pytest.mark.verify)])
async def test_a_worker_that_its_pool_can_spare_changes_its_role_rather_than_that_one_is_started(
    tmp_path: Path, refused: bool
) -> None:
    env = {"KEEPS_ITS_ROLE": "1"} if refused else {}
    cluster = scaled_config(
        tmp_path / "load",
        scaling={"max_gpus": 3},
        decode__replicas=2,
        prefill__env=env,
        decode__env=env,
    )
    async with running(cluster, tmp_path) as controller:
        before = endpoints(controller.view())
        view = await until(controller, lambda view: view.settled and size_of(view, "prefill") == 2)
        assert size_of(view, "decode") == 1
        after = endpoints(view)
        assert set(after) == set(before)
        (name,) = (member.name for member in view.members if member.role == "prefill" and member.name != "prefill-0")
        assert after.pop(name).boot_id != before[name].boot_id
        assert after == {other: endpoint for other, endpoint in before.items() if other != name}
        assert (endpoints(view)[name].pid == before[name].pid) is not refused
        assert controller.roles[name] == "prefill"
    assert replay_log(scaling_log(tmp_path), controller.config)[1] == []


async def test_a_worker_that_was_switched_by_hand_counts_in_its_new_pool(tmp_path: Path) -> None:
    async with running(config(prefill__replicas=2), tmp_path) as controller:
        before = endpoints(controller.view())
        assert await switch_worker(before["prefill-1"].address, "decode", 1.0) is not None
        view = await until(controller, lambda view: view.settled and size_of(view, "decode") == 2)
        assert size_of(view, "prefill") == 1
        assert controller.roles["prefill-1"] == "decode"
        assert {name: endpoint.pid for name, endpoint in endpoints(view).items()} == {
            name: endpoint.pid for name, endpoint in before.items()
        }
        # The last one of its pool: the other one goes back, since decode has one too many.
        assert await switch_worker(before["prefill-0"].address, "decode", 1.0) is not None
        view = await until(controller, lambda view: view.settled and controller.roles.get("prefill-0") != "prefill")
        assert (size_of(view, "prefill"), size_of(view, "decode")) == (1, 2)
        assert controller.roles["prefill-1"] == "prefill"


@pytest.mark.verify  # the one above has it with the last one of a pool
async def test_a_worker_that_was_switched_by_hand_goes_back_when_the_file_is_applied_again(tmp_path: Path) -> None:
    cluster = config(prefill__replicas=2, decode__replicas=1)
    async with running(cluster, tmp_path) as controller:
        before = endpoints(controller.view())
        assert await switch_worker(before["prefill-1"].address, "decode", 1.0) is not None
        await until(controller, lambda view: view.settled and size_of(view, "decode") == 2)
        controller.apply(cluster)
        view = await until(controller, lambda view: view.settled)
        assert (size_of(view, "prefill"), size_of(view, "decode")) == (2, 1)
        assert {name: endpoint.pid for name, endpoint in endpoints(view).items()} == {
            name: endpoint.pid for name, endpoint in before.items()
        }


@pytest.mark.verify
async def test_a_worker_that_changes_its_role_before_its_turn_gets_new_settings_too(tmp_path: Path) -> None:
    async with running(config(decode__replicas=2), tmp_path) as controller:
        before = endpoints(controller.view())
        held = tmp_path / "held"
        os.mkfifo(held)
        env = {"STARTS_AFTER": str(held)}
        controller.apply(config(decode__replicas=2, prefill__env=env, decode__env=env))
        await until(controller, lambda view: phase_of(view, "prefill-1") is Phase.STARTING)
        assert await switch_worker(before["decode-1"].address, "prefill", 1.0) is not None
        await until(controller, lambda view: controller.roles["decode-1"] == "prefill")
        writer = os.open(held, os.O_RDWR)
        view = await until(controller, lambda view: view.settled)
        os.close(writer)
        assert (size_of(view, "prefill"), size_of(view, "decode")) == (2, 1)
        processes = [psutil.Process(e.pid) for name, e in endpoints(view).items() if name != "router-0"]
        assert [process.environ().get("STARTS_AFTER") for process in processes] == [str(held)] * 3


async def test_scaling_that_cannot_decide_is_an_error_at_the_start(tmp_path: Path) -> None:
    cluster = scaled_config(tmp_path / "load", scaling={"max_gpus": 1})
    with pytest.raises(ConfigError, match="the GPU budget is 1 and the fewest workers of both pools hold 2"):
        await Controller(cluster, tmp_path, command=stand_in).run()


async def test_a_certificate_that_is_not_there_is_an_error_at_the_start(tmp_path: Path) -> None:
    files = {name: str(tmp_path / f"{{role}}.{name}") for name in ("ca", "cert", "key")}
    with pytest.raises(ConfigError, match=r"cannot read .*; check the TLS options"):
        await Controller(config(security=files), tmp_path, command=stand_in).run()


async def test_a_cluster_serves_on_while_scaling_cannot_decide(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def num_decisions() -> int:
        return sum(len(log.read_text().splitlines()) for log in tmp_path.glob("scaling-*.jsonl"))

    cluster = scaled_config(tmp_path / "load", scaling={}, prefill__max=1, decode__max=1)
    async with running(cluster, tmp_path) as controller:
        scaling = cluster.scaling.model_copy(update={"calibration": tmp_path / "calibration.json"})
        controller.apply(cluster.model_copy(update={"scaling": scaling}))
        await until(controller, lambda view: "pools keep their sizes: --calibration: cannot read" in caplog.text)
        before = num_decisions()
        controller.apply(cluster)
        await until(controller, lambda view: num_decisions() > before)

        def fail(*_: object) -> None:
            raise ZeroDivisionError

        with monkeypatch.context() as broken:
            broken.setattr(Scaling, "decide", fail)
            await until(controller, lambda view: "pools keep their sizes: the scaling policy failed" in caplog.text)
        before = num_decisions()
        await until(controller, lambda view: num_decisions() > before)


async def test_a_worker_that_comes_back_while_settings_change_gets_them_too(tmp_path: Path) -> None:
    held = tmp_path / "held"
    os.mkfifo(held)
    writer = os.open(held, os.O_RDWR)
    async with running(config(decode__env={"STARTS_AFTER": str(held)}), tmp_path) as controller:
        before = endpoints(controller.view())
        os.close(writer)
        os.kill(before["decode-0"].pid, signal.SIGKILL)
        await until(controller, lambda view: phase_of(view, "decode-0") is Phase.STARTING)
        await asyncio.sleep(1.0)  # its process waits by now
        controller.apply(config(decode__env={"COLOUR": "blue"}))
        await asyncio.sleep(0.5)
        writer = os.open(held, os.O_RDWR)
        after = endpoints(await until(controller, lambda view: view.settled, 30.0))
        os.close(writer)
        (worker,) = [endpoint for name, endpoint in after.items() if name.startswith("decode-")]
        assert psutil.Process(worker.pid).environ()["COLOUR"] == "blue"
