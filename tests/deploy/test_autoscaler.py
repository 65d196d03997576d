"""Ray's own autoscaler: a worker that waits for room brings a node of its kind, and a node without workers goes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from .autoscaled import autoscaled_ray, kinds_of_living_nodes
from .nodes import kinds_of
from .stand_in_roles import config, running, until

pytestmark = [pytest.mark.cluster, pytest.mark.verify, pytest.mark.timeout(600)]

KINDS = {"prefill": "H100", "decode": "H200"}
WAIT_S = 240.0


async def test_nodes_come_with_the_workers_that_need_them_and_go_after_them(tmp_path: Path) -> None:
    pools = {f"{pool}__accelerator_type": kind for pool, kind in KINDS.items()} | dict.fromkeys(
        ("prefill__gpus", "decode__gpus"), 1
    )
    with (
        tempfile.TemporaryDirectory() as directory,
        autoscaled_ray(Path(directory), tuple(KINDS.values())) as address,
    ):
        cluster = config(ray__address=address, engine__device="cpu", placement__wait_for_nodes_s=WAIT_S, **pools)
        assert kinds_of_living_nodes() == []
        async with running(cluster, tmp_path) as controller:
            kinds = kinds_of(controller.view())
            assert {name: kinds[name] for name in ("prefill-0", "decode-0")} == {
                "prefill-0": "H100",
                "decode-0": "H200",
            }
            controller.apply(controller.config.scaled({"decode": 2}))
            view = await until(controller, lambda view: view.settled, WAIT_S)
            assert kinds_of(view)["decode-1"] == "H200"
            assert kinds_of_living_nodes() == ["H100", "H200", "H200"]
            controller.apply(controller.config.scaled({"decode": 1}))
            await until(controller, lambda _: kinds_of_living_nodes() == ["H100", "H200"], WAIT_S)
