"""A client that is gone without a word: what it asked for is freed on the router and on both workers."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from .conftest import ANSWER, PROMPT, WAIT_S, Scene, StartScene, granted, speak

CLIENT = """
import sys
from splitserve.client import Client
with Client(sys.argv[1]) as client, client.stream({prompt}, max_tokens=100) as stream:
    for chunk in stream:
        print("token", flush=True)
"""


@asynccontextmanager
async def client_process(scene: Scene) -> AsyncIterator[asyncio.subprocess.Process]:
    """One that has some tokens and waits for more."""
    code = CLIENT.format(prompt=PROMPT)
    command = (sys.executable, "-c", code, scene.router.address)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        prefill, work = await granted(scene)
        prefill.first_token(work, ANSWER[0])
        scene.decode.transfer_done(work, ANSWER[0])
        speak(scene.decode, work, 1, 5)
        assert process.stdout is not None
        async with asyncio.timeout(WAIT_S):
            assert await process.stdout.readline()
        yield process
    finally:
        with suppress(ProcessLookupError):  # it is dead already
            process.kill()
        await process.wait()


@pytest.mark.chaos
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
async def test_a_lost_client_is_noticed_and_its_request_freed(start_scene: StartScene, blow: signal.Signals) -> None:
    """A hanging one answers no ping: its connection is given up after 1.9 s, though it stays open."""
    scene = await start_scene()
    async with client_process(scene) as process:
        process.send_signal(blow)
        await scene.decode.receive_cancel()
        scene.check_nothing_left()
