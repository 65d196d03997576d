"""The device loop: works while there is work, survives a failing step, and says when it is stuck."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from splitserve.core.request import Request
from splitserve.engine.engine import Engine
from splitserve.engine.loop import DeviceLoop
from splitserve.engine.outputs import StepOutput

LONG_S = 30.0


@contextmanager
def running(engine: Engine) -> Iterator[tuple[DeviceLoop, "queue.Queue[StepOutput]"]]:
    outputs: queue.Queue[StepOutput] = queue.Queue()
    loop = DeviceLoop(engine, outputs.put)
    loop.start()
    try:
        yield loop, outputs
    finally:
        loop.stop()


def make_request(request_id: str, max_tokens: int = 3) -> Request:
    return Request(request_id=request_id, prompt_token_ids=(1, 2, 3), max_tokens=max_tokens)


def tokens_until_finished(outputs: "queue.Queue[StepOutput]") -> list[int]:
    indices = []
    while True:
        for token in outputs.get(timeout=LONG_S).tokens:
            indices.append(token.index)
            if token.finish_reason is not None:
                return indices


def test_a_wake_runs_the_work_to_its_end(make_engine: Any) -> None:
    engine = make_engine()
    with running(engine) as (loop, outputs):
        for request_id in ("a", "b"):
            engine.add(make_request(request_id))
            loop.wake()
            assert tokens_until_finished(outputs) == [0, 1, 2]


def test_a_failing_step_fails_its_requests_and_the_loop_goes_on(make_engine: Any) -> None:
    failures = [OSError("broken")]

    def fail_once(*_: object) -> None:
        if failures:
            raise failures.pop()

    engine = make_engine(kv_written=fail_once)
    with running(engine) as (loop, outputs):
        engine.add(make_request("a"), prefill_only=True)
        loop.wake()
        assert [request_id for request_id, _ in outputs.get(timeout=LONG_S).failed] == ["a"]
        engine.add(make_request("b"))
        loop.wake()
        assert tokens_until_finished(outputs) == [0, 1, 2]


def test_a_failing_step_whose_requests_are_all_released_lets_the_next_begin(make_engine: Any) -> None:
    def release_and_fail(*_: object) -> None:
        engine.release("a")
        raise OSError("broken")

    engine = make_engine(num_kv_blocks=4, prefix_cache=False, kv_written=release_and_fail)
    engine.add(Request(request_id="a", prompt_token_ids=(1,) * 60, max_tokens=3), prefill_only=True)
    engine.add(make_request("b"))  # has no room yet
    with running(engine) as (loop, outputs):
        loop.wake()
        assert outputs.get(timeout=LONG_S).failed == []
        assert tokens_until_finished(outputs) == [0, 1, 2]


def fail(*_: object) -> None:
    raise RuntimeError("the device is gone")


def test_a_step_that_cannot_even_be_planned_is_not_tried_without_end(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, tried = make_engine(), threading.Event()

    def fail_to_plan() -> None:
        tried.set()
        fail()

    monkeypatch.setattr(engine._scheduler, "schedule", fail_to_plan)
    with running(engine) as (loop, outputs):
        engine.add(make_request("a"))
        loop.wake()
        assert tried.wait(LONG_S)
        loop.stop()
        assert outputs.empty()


@pytest.mark.parametrize("part", ["warm_up", "abandon_step"])
def test_a_loop_that_ended_is_stalled_at_once(make_engine: Any, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    engine = make_engine(kv_written=fail)
    monkeypatch.setattr(engine, part, fail)
    with running(engine) as (loop, _):
        engine.add(make_request("a"), prefill_only=True)
        loop.wake()
        loop._thread.join(LONG_S)
        assert loop.ended
        assert loop.stalled(3600.0)


def test_a_failing_consumer_does_not_end_the_loop(make_engine: Any) -> None:
    engine, finished = make_engine(), threading.Event()

    def consume(output: StepOutput) -> None:
        if output.tokens[0].finish_reason is not None:
            finished.set()
        raise ValueError("the consumer broke")

    loop = DeviceLoop(engine, consume)
    loop.start()
    engine.add(make_request("a"))
    loop.wake()
    assert finished.wait(LONG_S)
    loop.stop()


def test_stalled_means_a_step_that_does_not_end_and_not_idleness(make_engine: Any) -> None:
    entered, leave = threading.Event(), threading.Event()

    def block(*_: object) -> None:
        entered.set()
        assert leave.wait(LONG_S)

    engine = make_engine(kv_written=block)
    with running(engine) as (loop, outputs):
        assert not loop.stalled(0.0)
        engine.add(make_request("a"), prefill_only=True)
        loop.wake()
        assert entered.wait(LONG_S)
        assert loop.stalled(0.0)
        assert not loop.stalled(3600.0)
        leave.set()
        assert outputs.get(timeout=LONG_S).tokens


def test_stop_before_start_and_stop_twice_are_harmless(make_engine: Any) -> None:
    loop = DeviceLoop(make_engine(), lambda _: None)
    loop.stop()
    with running(make_engine()) as (running_loop, _):
        running_loop.stop()
