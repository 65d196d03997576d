"""What a worker says to a router besides what the router asked for."""

from __future__ import annotations

import asyncio

import pytest
from splitserve.worker import session as session_module
from splitserve.worker.session import Session


class Call:
    """A router that says nothing and takes everything."""

    def __init__(self) -> None:
        self.taken: list[str] = []

    async def read(self) -> str:
        await asyncio.Event().wait()
        raise AssertionError

    async def write(self, message: str) -> None:
        self.taken.append(message)


async def test_a_session_that_streams_without_a_pause_tells_its_status_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "STATUS_PERIOD_S", 0.2)
    session: Session[str, str] = Session("r", lambda _: "status")
    call = Call()
    running = asyncio.create_task(session.run(call, lambda _: None))
    async with asyncio.timeout(30):
        while call.taken.count("status") < 3:
            session.send("token")
            await asyncio.sleep(0.01)
    assert call.taken.count("token") > 3
    session.end()
    await running


async def test_a_message_that_waits_for_its_moment_keeps_its_place() -> None:
    said = ["grant", "cancel"]

    class Asking(Call):
        async def read(self) -> str:
            return said.pop(0) if said else await super().read()

    handled: list[str] = []
    quiet = asyncio.Event()

    async def pause(message: str) -> None:
        if message == "grant":
            await quiet.wait()

    session: Session[str, str] = Session("r", lambda _: "status")
    running = asyncio.create_task(session.run(Asking(), handled.append, pause))
    await asyncio.sleep(0.05)
    assert handled == []
    quiet.set()
    async with asyncio.timeout(30):
        while len(handled) < 2:
            await asyncio.sleep(0.01)
    assert handled == ["grant", "cancel"]
    session.end()
    await running
