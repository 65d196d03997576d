"""Work whose deadline passed while it waited is dropped before it costs a step."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from splitserve.engine.engine import Engine
from splitserve.proto import worker_pb2
from splitserve.proto.convert import request_to_proto

from .conftest import Pair
from .test_roles import PROMPT, request

OTHER = PROMPT[::-1]


@contextmanager
def held(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The device is busy: no step begins before the end of the block."""
    gate, step = threading.Event(), engine.step

    def gated() -> object:
        gate.wait()
        return step()

    monkeypatch.setattr(engine, "step", gated)
    try:
        yield
    finally:
        gate.set()


async def test_a_prompt_that_expires_in_the_queue_is_never_computed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = pair.prefill.worker.host.engine
    late = request("late", prompt=OTHER)
    late_grant = await pair.grant(late)
    first = request("first")
    grant = await pair.grant(first)
    with held(engine, monkeypatch):
        await pair.prefill_run(first, grant)
        run = worker_pb2.RunPrefill(request=request_to_proto(late, 0.05), grant=late_grant)
        await pair.prefill_end.send(run=run)
        failed = await pair.prefill_end.next("failed")
    assert (failed.request_id, failed.failure.code) == ("late", "deadline_exceeded")
    assert (await pair.decode_end.next("failed")).request_id == "late"  # the other side is told at once
    await pair.prefill_end.next("first_token")
    await pair.decode_end.next("transfer_done")
    assert len(await pair.rest(1)) == 11
    assert engine.prompt_tokens == len(PROMPT)
    await pair.idle()


async def test_a_local_run_that_expires_in_the_queue_is_never_computed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = pair.decode.worker.host.engine
    with held(engine, monkeypatch):
        for work, timeout_s in ((request("first"), 60.0), (request("late", prompt=OTHER), 0.05)):
            await pair.decode_end.send(run=worker_pb2.RunLocal(request=request_to_proto(work, timeout_s)))
        failed = await pair.decode_end.next("failed")
    assert (failed.request_id, failed.failure.code) == ("late", "deadline_exceeded")
    assert len(await pair.rest(0)) == 12
    assert engine.prompt_tokens == len(PROMPT)
    await pair.idle()
