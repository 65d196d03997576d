"""Several Ray nodes of two kinds on one machine: pools land where they were asked to, and heal when a node dies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from .nodes import Nodes, kinds_of, ray_nodes
from .stand_in_roles import config, endpoints, running, until, workers_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

KINDS = {"prefill": "H100", "decode": "H200"}


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with ray_nodes() as cluster:
        yield cluster


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
