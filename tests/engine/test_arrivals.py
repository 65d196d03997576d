"""A sequence whose transfer is about to end: the next step waits for it, and for nobody who came or went."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from splitserve.core.request import Request
from splitserve.engine import runner as runner_module
from splitserve.engine.engine import Engine
from splitserve.engine.loading import LoadedModel

from .test_parameters import AheadRunner

LONG_S = 30.0


def make(request_id: str) -> Request:
    return Request(request_id=request_id, prompt_token_ids=tuple(range(3, 40)), max_tokens=20)


def slow_steps(engine: Engine) -> None:
    """As if a decode step took so long that it could be waited for without end, and it were high time to plan."""
    engine._pace._decode_s = deque([100 * LONG_S])
    engine._pace._prepare_s = deque([200 * LONG_S])


def planned(engine: Engine) -> set[str]:
    """Who takes part in the step that runs."""
    return {part.sequence.request_id for part in engine._launched[-1].plan.parts}


def expecting(engine: Engine, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """One sequence decodes, and the transfer of another is about to end. Returns what is set while a step waits."""
    engine._runner = runner = AheadRunner(engine, tiny)
    monkeypatch.setattr(runner_module, "forward", runner.knowing_the_last)
    held, wait_for = threading.Event(), engine._arrived.wait_for

    def tell_and_wait(condition: Callable[[], bool], timeout: float) -> bool:
        held.set()
        return wait_for(condition, timeout)

    monkeypatch.setattr(engine._arrived, "wait_for", tell_and_wait)
    engine.add(make("decodes"))
    engine.step()
    assert planned(engine) == {"decodes"}
    engine.reserve(make("r"))
    engine.expect_reserved("r")
    return held


@pytest.mark.parametrize("end", ["started", "released"])
def test_a_step_waits_for_an_expected_sequence_until_it_starts_or_is_released(
    make_engine: Any, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    engine = make_engine()
    held = expecting(engine, tiny, monkeypatch)
    slow_steps(engine)
    with ThreadPoolExecutor(1) as device:
        step = device.submit(engine.step)
        assert held.wait(LONG_S), "the next step was planned without it"
        assert not step.done()
        if end == "started":
            engine.start_reserved("r", 9)
        else:
            engine.release("r")
        assert step.result(LONG_S) is not None
    assert planned(engine) == ({"decodes", "r"} if end == "started" else {"decodes"})
    held.clear()
    slow_steps(engine)
    engine.step()
    assert not held.is_set(), "nobody is expected any more"


def test_a_step_does_not_wait_again_for_whoever_did_not_come(
    make_engine: Any, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    held = expecting(engine, tiny, monkeypatch)
    for waits in (True, False):
        held.clear()
        slow_steps(engine)
        engine._pace._decode_s = deque([0.001])
        engine.step()
        assert held.is_set() == waits
    engine.start_reserved("r", 9)
    engine.step()
    assert planned(engine) == {"decodes", "r"}


def test_whoever_was_released_before_is_not_waited_for(make_engine: Any) -> None:
    engine = make_engine()
    engine.reserve(make("r"))
    engine.release("r")
    engine.expect_reserved("r")
    assert not engine._due
