"""Several Ray nodes of two kinds on one machine: pools land where they were asked to, and heal when a node dies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from splitserve.deploy.members import ClusterView

from .stand_in_roles import config, endpoints, running, until, workers_of

pytestmark = pytest.mark.cluster

KINDS = {"prefill": "H100", "decode": "H200"}


class Nodes:
    """A Ray cluster whose nodes are processes of this machine; their GPUs are only counted."""

    def __init__(self) -> None:
        self._cluster = Cluster()
        self._number = 0
        self.head = self.add(num_cpus=1, num_gpus=0)
        ray.init(
            address=self._cluster.address,
            namespace="nodes",
            log_to_driver=False,
            configure_logging=False,
            _node_ip_address="127.0.1.1",
        )

    def add(self, kind: str = "", **resources: Any) -> Any:
        self._number += 1
        labels = {"ray.io/accelerator-type": kind} if kind else {}
        return self._cluster.add_node(
            node_ip_address=f"127.0.1.{self._number}",
            labels=labels,
            object_store_memory=80 << 20,
            **({"include_dashboard": False} if self._number == 1 else {}),
            **resources,
        )

    def kill(self, node: Any) -> None:
        """Like a power cut: nobody is told."""
        processes = [info.process for infos in node.all_processes.values() for info in infos]
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
        self._cluster.worker_nodes.discard(node)

    def close(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "120")
    before = set(psutil.Process().children(recursive=True))
    cluster = Nodes()
    try:
        yield cluster
    finally:
        cluster.close()
    left = set(psutil.Process().children(recursive=True)) - before
    _, alive = psutil.wait_procs(left, timeout=30)
    assert not [process.cmdline() for process in alive]


def kinds_of(view: ClusterView) -> dict[str, str]:
    """The accelerator type of the node that each process is on; empty on the head."""
    types = {node["NodeID"]: node["Labels"].get("ray.io/accelerator-type", "") for node in ray.nodes()}
    return {name: types[endpoint.node] for name, endpoint in endpoints(view).items()}


async def test_pools_land_where_they_are_asked_to_and_heal_when_a_node_dies(nodes: Nodes, tmp_path: Path) -> None:
    prefill = nodes.add("H100", num_cpus=2, num_gpus=2)
    decodes = [nodes.add("H200", num_cpus=2, num_gpus=1) for _ in range(2)]
    wanted = {
        f"{pool}__{key}": value
        for pool, kind in KINDS.items()
        for key, value in (("gpus", 1), ("accelerator_type", kind))
    }
    cluster = config(
        prefill__replicas=2, engine__device="cpu", ray__address=ray.get_runtime_context().gcs_address, **wanted
    )
    async with running(cluster, tmp_path) as controller:
        view = controller.view()
        assert kinds_of(view) == {"prefill-0": "H100", "prefill-1": "H100", "decode-0": "H200", "router-0": ""}
        before = endpoints(view)
        assert before["decode-0"].address.startswith("127.0.1.")
        assert before["prefill-0"].node == prefill.node_id

        lost = next(node for node in decodes if node.node_id == before["decode-0"].node)
        nodes.kill(lost)
        view = await until(controller, lambda view: view.settled and endpoints(view)["decode-0"] != before["decode-0"])
        after = endpoints(view)
        assert after["decode-0"].node == next(node.node_id for node in decodes if node is not lost)
        assert {name: after[name] for name in ("prefill-0", "prefill-1", "router-0")} == {
            name: before[name] for name in ("prefill-0", "prefill-1", "router-0")
        }
        assert workers_of(view) == {after[name].address for name in ("prefill-0", "prefill-1", "decode-0")}
        assert not psutil.pid_exists(before["decode-0"].pid)

        # There is no other H200 for a second one; what each node lacks is told, and one that comes is taken.
        controller.apply(controller.config.scaled({"decode": 2}))
        view = await until(controller, lambda view: any(m.reason for m in view.members))
        assert "127.0.1.2 has label ray.io/accelerator-type=H100, not H200" in view.members[-1].reason
        nodes.add("H200", num_cpus=2, num_gpus=1)
        view = await until(controller, lambda view: view.settled)
        assert kinds_of(view)["decode-1"] == "H200"
