import json
import os
from pathlib import Path

from splitserve.core.events import Event, Recorder, StepRecord


def step(number: int) -> StepRecord:
    return StepRecord(
        step=number,
        at_s=1.0,
        kind="decode",
        num_sequences=2,
        num_prefill_tokens=0,
        num_decode_tokens=2,
        num_context_tokens=64,
        num_new_tokens=2,
        schedule_s=0.001,
        run_s=0.01,
        total_s=0.011,
        num_waiting=0,
        num_free_blocks=7,
    )


def test_a_timeline_holds_only_its_request_in_time_order() -> None:
    recorder = Recorder("router")
    recorder.event("a", Event.ADMITTED, at_s=2.0)
    recorder.event("b", Event.ARRIVED, at_s=1.5)
    recorder.event("a", Event.ARRIVED, at_s=1.0)
    assert [event.event for event in recorder.timeline("a")] == [Event.ARRIVED, Event.ADMITTED]


def test_the_ring_forgets_the_oldest() -> None:
    recorder = Recorder("router", capacity=2)
    for number in range(3):
        recorder.step(step(number))
    assert [record.step for record in recorder.recent_steps()] == [1, 2]


def test_every_event_and_step_is_a_json_line(tmp_path: Path) -> None:
    recorder = Recorder("decode-1", tmp_path / "traces")
    recorder.event("a", Event.FIRST_TOKEN, attempt=2, bytes=5)
    recorder.step(step(1))
    recorder.close()
    (path,) = (tmp_path / "traces").iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["type"] for row in rows] == ["event", "step"]
    assert rows[0]["event"] == "first_token"
    assert (rows[0]["process"], rows[0]["attempt"], rows[0]["detail"]) == ("decode-1", 2, {"bytes": 5})
    assert rows[1]["num_context_tokens"] == 64


def test_a_full_disk_ends_the_trace_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / f"decode-1-{os.getpid()}.jsonl").symlink_to("/dev/full")  # every write fails with ENOSPC
    recorder = Recorder("decode-1", tmp_path)
    recorder.event("a", Event.ARRIVED)
    recorder.step(step(1))
    assert [event.event for event in recorder.timeline("a")] == [Event.ARRIVED]
    assert [record.step for record in recorder.recent_steps()] == [1]
    recorder.close()
