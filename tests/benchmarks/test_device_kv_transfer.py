"""The benchmark of transports between GPUs, all but the GPUs: two processes, in host memory."""

from __future__ import annotations

import json
from pathlib import Path

from splitserve.benchmarks.device_kv_transfer import Plan, run
from splitserve.core.kv_geometry import KvGeometry, LayerGeometry

TINY = KvGeometry(
    model_id="tiny", layers=(LayerGeometry(num_kv_heads=2, key_dim=16, value_dim=16),) * 2, dtype="bfloat16"
)


def test_every_way_is_measured_alone_together_and_beside_steps(tmp_path: Path) -> None:
    ways = ("shared_memory", "grpc", "gloo")
    plan = Plan(
        ways=ways, sizes=(32, 320), rounds=1, in_flight=2, devices=("cpu", "cpu"), geometry=TINY, step_seconds=0.05
    )
    figures = run(plan, tmp_path / "kv.json")
    assert [(row.way, row.num_bytes // TINY.bytes_per_token) for row in figures.moved] == [
        (way, size) for way in ways for size in plan.sizes
    ]
    assert set(figures.steps) == {"nothing", *ways, "nothing, again"}
    assert all(moved > 0 for moved in figures.beside_bytes_per_s.values())
    written = json.loads((tmp_path / "kv.json").read_text())
    assert written["plan"]["ways"] == list(ways)
    assert set(written["limits"]) == {"copy", "gloo, contiguous"}


def test_without_a_way_by_messages_no_message_is_measured(tmp_path: Path) -> None:
    plan = Plan(ways=("grpc",), sizes=(32,), rounds=1, in_flight=1, devices=("cpu", "cpu"), geometry=TINY)
    assert set(run(plan, None).limits) == {"copy"}
