"""Ray's head dies and comes back: processes serve all the while, and the controller finds them again."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import pytest
from ray import cloudpickle
from splitserve.deploy.cluster_handle import ClusterHandle
from splitserve.deploy.process import Endpoint
from splitserve.proto import worker_pb2
from splitserve.proto.worker_pb2_grpc import WorkerAdminStub

from . import stand_in_roles
from .nodes import Nodes, ray_nodes
from .stand_in_roles import endpoints
from .test_controller_actor import config, started, until

pytestmark = [pytest.mark.cluster, pytest.mark.verify, pytest.mark.timeout(600)]

cloudpickle.register_pickle_by_value(sys.modules[stand_in_roles.__name__])  # the actor cannot import tests


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """A head whose storage outlives it, and a node beside it."""
    storage = tmp_path / "head"
    storage.mkdir()
    monkeypatch.setenv("RAY_gcs_storage", "rocksdb")
    monkeypatch.setenv("RAY_gcs_storage_path", str(storage))
    with ray_nodes() as cluster:
        cluster.add("H100", num_cpus=8)
        yield cluster


async def serves(worker: Endpoint) -> bool:
    async with grpc.aio.insecure_channel(worker.address) as channel:
        await WorkerAdminStub(channel).GetWorkerStatus(worker_pb2.GetWorkerStatusRequest(), timeout=30)
    return True


async def settled(handle: ClusterHandle) -> dict[str, Endpoint]:
    return endpoints(await until(handle, lambda view: view.settled))


async def test_processes_serve_while_the_head_is_away_and_the_controller_comes_back_to_them(
    nodes: Nodes, tmp_path: Path
) -> None:
    async with started(config(), tmp_path) as handle:
        before = await settled(handle)
        workers = [endpoint for name, endpoint in before.items() if not name.startswith("router")]
        assert len(workers) == 2
        controller = await handle.pid()

        nodes.head.kill_gcs_server()
        os.kill(controller, signal.SIGKILL)  # nobody can start it again now
        for worker in workers:
            assert await serves(worker)
        await asyncio.to_thread(nodes.head.start_gcs_server)

        assert await settled(handle) == before
        assert await handle.pid() != controller
        for worker in workers:
            assert await serves(worker)
        os.kill(before["prefill-0"].pid, signal.SIGKILL)  # and it heals as it did
        view = await until(handle, lambda view: view.settled and endpoints(view)["prefill-0"] != before["prefill-0"])
        assert endpoints(view)["decode-0"] == before["decode-0"]
