"""Several Ray nodes of two kinds as processes of this machine, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster
from splitserve.deploy.members import ClusterView

from .conftest import started_since
from .stand_in_roles import endpoints


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


@contextmanager
def ray_nodes() -> Iterator[Nodes]:
    """A head without GPUs; everything is gone afterwards."""
    before = set(psutil.Process().children(recursive=True))
    try:
        cluster = Nodes()
    except Exception as error:  # as for a single node, see conftest.py
        if "timed out during startup" not in str(error):
            raise
        for process in started_since(before):
            process.kill()
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
