"""Calibration from step records, and from a worker that is driven over its own protocol."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from splitserve.core.errors import ConfigError, Unavailable
from splitserve.core.events import StepKind, StepRecord
from splitserve.decode_worker.server import DecodeServer
from splitserve.engine.options import EngineOptions
from splitserve.engine.testing import make_tiny_model
from splitserve.planner.calibration import (
    calibrate,
    merge_calibrations,
    read_calibration,
    read_records,
    write_calibration,
)
from splitserve.planner.latency import StepLatency
from splitserve.planner.probe import probe_worker
from splitserve.prefill_worker.server import PrefillServer
from splitserve.worker.options import WorkerOptions

TRUTH = StepLatency(
    prefill_base_s=0.02,
    prefill_token_s=1e-4,
    prefill_pair_s=2e-8,
    prefill_sequence_s=0.0,
    prefill_knees=((512.0, 3e-5),),
    decode_base_s=0.015,
    decode_sequence_s=3e-4,
    decode_context_s=4e-8,
)


def record(kind: StepKind, *, tokens: int, batch: int, context: int, sequences: int, seconds: float) -> StepRecord:
    return StepRecord(
        step=1,
        at_s=0.0,
        kind=kind,
        num_sequences=sequences,
        num_prefill_tokens=tokens,
        num_decode_tokens=batch,
        num_context_tokens=context,
        num_new_tokens=sequences,
        schedule_s=0.0,
        run_s=seconds,
        total_s=seconds,
        num_waiting=0,
        num_free_blocks=0,
    )


def records(count: int, noise: float, seed: int = 0) -> list[StepRecord]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        tokens, before = int(rng.integers(16, 4096)), int(rng.integers(0, 8192))
        seconds = TRUTH.prefill_step_s([(tokens, before)]) * rng.lognormal(0, noise)
        made.append(record("prefill", tokens=tokens, batch=0, context=tokens + before, sequences=1, seconds=seconds))
        batch, context = int(rng.integers(1, 64)), int(rng.integers(100, 100_000))
        seconds = TRUTH.decode_step_s(batch, context) * rng.lognormal(0, noise)
        made.append(record("decode", tokens=0, batch=batch, context=context, sequences=batch, seconds=seconds))
    return made


def test_costs_are_found_again_and_intervals_hold_them() -> None:
    found = calibrate(records(400, noise=0.05), source="made up")
    for chunks in ([(100, 0)], [(512, 4096)], [(4000, 0)], [(256, 0), (256, 0)]):
        assert found.latency.prefill_step_s(chunks) == pytest.approx(TRUTH.prefill_step_s(chunks), rel=0.04)
    for batch, context in ((1, 500), (32, 64_000), (60, 6_000)):
        assert found.latency.decode_step_s(batch, context) == pytest.approx(
            TRUTH.decode_step_s(batch, context), rel=0.04
        )
    assert found.decode is not None
    assert found.prefill is not None
    assert found.decode.low["step"] * 0.98 <= TRUTH.decode_base_s <= found.decode.high["step"] * 1.02
    assert found.decode.error == pytest.approx(0.04, abs=0.015)  # mean of |noise| at 5 %
    assert found.provenance.layer == "calibrated"


def test_a_few_steps_that_seem_to_have_taken_no_time_do_not_decide_the_costs() -> None:
    made = records(400, noise=0.05)
    for number in range(0, len(made), 40):  # one too long, and the one behind it too short
        long, short = made[number], made[number + 2]
        made[number] = replace(long, total_s=long.total_s * 20)
        made[number + 2] = replace(short, total_s=short.total_s / 500)
    found = calibrate(made, source="made up")
    assert found.prefill is not None
    assert found.prefill.num_left_out >= 20
    assert found.prefill.error < 0.06
    assert found.latency.prefill_step_s([(2048, 0)]) == pytest.approx(TRUTH.prefill_step_s([(2048, 0)]), rel=0.04)


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    found = calibrate(records(50, noise=0.02), source="made up")
    write_calibration(tmp_path / "c.json", found, {"worker": "decode-0", "num_kv_blocks": 900, "max_step_tokens": 256})
    assert read_calibration(tmp_path / "c.json") == replace(found, num_kv_blocks=900, max_step_tokens=256)
    assert json.loads((tmp_path / "c.json").read_text())["worker"] == "decode-0"


def test_step_records_are_read_from_what_workers_write(tmp_path: Path) -> None:
    path = tmp_path / "decode-0-1.jsonl"
    steps = records(20, noise=0.01)
    lines = [json.dumps({"type": "step", "process": "decode-0", **asdict(step)}) for step in steps]
    lines.insert(3, json.dumps({"type": "event", "process": "decode-0", "event": "finished"}))
    path.write_text("\n".join(lines) + "\n")
    assert read_records([path]) == steps
    path.write_text("\n".join(lines[:4]) + '\n{"type": "step"\n')
    with pytest.raises(ConfigError, match="line 5: not a step record"):
        read_records([path])


def test_two_files_make_one_model_and_twice_the_same_kind_does_not() -> None:
    every = records(50, noise=0.02)
    prefill = calibrate([step for step in every if step.kind == "prefill"], source="p")
    decode = calibrate([step for step in every if step.kind == "decode"], source="d")
    merged = merge_calibrations([decode, prefill])
    assert merged.latency.prefill_step_s([(100, 0)]) == prefill.latency.prefill_step_s([(100, 0)])
    assert merged.latency.decode_step_s(8, 800) == decode.latency.decode_step_s(8, 800)
    with pytest.raises(ConfigError, match="2 of 2 files hold prefill steps"):
        merge_calibrations([prefill, prefill])
    with pytest.raises(ConfigError, match="0 of 1 files hold decode steps"):
        merge_calibrations([prefill])


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="5 prefill and 5 decode steps"):
        calibrate(records(5, noise=0.0), source="made up")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    make_tiny_model("llama", path)
    return path


async def test_real_workers_are_driven_and_left_clean(model_dir: Path) -> None:
    engine = EngineOptions(
        model=str(model_dir),
        dtype="float32",
        num_threads=1,
        num_kv_blocks=256,
        max_step_tokens=64,
        max_running=16,
        self_check=False,
        shared_pool=True,
    )
    prefill = PrefillServer(WorkerOptions(engine=engine, role="prefill"))
    decode = DecodeServer(WorkerOptions(engine=engine, role="decode"))
    colocated = DecodeServer(WorkerOptions(engine=engine, role="colocated"))
    try:
        told = [await server.worker.host.start() for server in (prefill, decode, colocated)]
        probed = [await probe_worker(ready.address, seconds=2.0) for ready in told]
        assert {step.kind for step in probed[0].records} == {"prefill"}
        assert max(step.num_prefill_tokens for step in probed[0].records) == 64
        batches = {step.num_decode_tokens for step in probed[1].records if step.kind == "decode"}
        assert {1} < batches
        assert all(step.total_s > 0 for one in probed for step in one.records)
        merged = merge_calibrations(
            [
                calibrate(probed[0].records, source="p"),
                calibrate([step for step in probed[1].records if step.kind == "decode"], source="d"),
            ]
        )
        assert merged.latency.prefill_step_s([(64, 0)]) > 0
        both = calibrate(probed[2].records, source="c")  # one that does both tells both
        assert both.prefill is not None
        assert both.decode is not None
        async with asyncio.timeout(60):
            for server in (prefill, decode, colocated):
                while (usage := server.worker.host.engine.usage()).blocks_live + usage.num_held + usage.num_running:
                    await asyncio.sleep(0.01)
    finally:
        await prefill.worker.stop()
        await decode.worker.stop()
        await colocated.worker.stop()


async def test_a_worker_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(Unavailable):
        await probe_worker("127.0.0.1:9", seconds=1.0)
