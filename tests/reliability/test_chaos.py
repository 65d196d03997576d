"""The chaos program: its plan, its links, its judgement, and a short run of it."""

from __future__ import annotations

import asyncio
import itertools
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from splitserve.benchmarks.chaos.followed import Followed
from splitserve.benchmarks.chaos.link import Link
from splitserve.benchmarks.chaos.plan import POOLS, ChaosPlan, FaultKind, PlannedRequest, make_plan
from splitserve.benchmarks.chaos.verdict import judge
from splitserve.client import AsyncClient, SplitserveError
from splitserve.client.testing import ScriptedRouter, finished, started, token
from splitserve.kv_transfer.frames import HEADER_BYTES, MAGIC
from splitserve.proto import inference_pb2

SEED = 20
WAIT_S = 30.0


def plan(seed: int, num_faults: int = 40) -> ChaosPlan:
    return make_plan(seed=seed, seconds=240, rate=4, num_faults=num_faults, aborts=0.1)


def test_a_plan_is_a_function_of_its_seed() -> None:
    first, again, other = plan(1), plan(1), plan(2)
    assert first == again != other
    assert list(itertools.islice(first.requests(), 500)) == list(itertools.islice(again.requests(), 500))
    assert list(itertools.islice(first.requests(), 500)) != list(itertools.islice(other.requests(), 500))


def test_a_plan_strikes_every_pool_with_every_class() -> None:
    faults = plan(3).faults
    assert {fault.pool for fault in faults} == set(POOLS)
    assert {fault.kind for fault in faults} == set(FaultKind)
    assert [fault.at_s for fault in faults] == sorted(fault.at_s for fault in faults)
    assert {fault.same_address for fault in faults if fault.kind is FaultKind.KILL} == {True, False}


@asynccontextmanager
async def echo_behind_a_link() -> AsyncIterator[Link]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    link = Link(random.Random(1))
    await link.start()
    link.target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield link
    finally:
        await link.close()
        server.close()
        await server.wait_closed()


async def connect(link: Link) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = link.address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def test_a_partitioned_link_delivers_what_it_held_when_it_is_healed() -> None:
    async with echo_behind_a_link() as link, asyncio.timeout(WAIT_S):
        reader, writer = await connect(link)
        writer.write(b"before")
        assert await reader.readexactly(6) == b"before"
        link.inject(FaultKind.PARTITION)
        writer.write(b"during")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await reader.readexactly(1)
        link.heal()
        assert await reader.readexactly(6) == b"during"
        writer.close()


async def test_a_cut_link_resets_connections_old_and_new_until_it_is_healed() -> None:
    async with echo_behind_a_link() as link, asyncio.timeout(WAIT_S):
        reader, writer = await connect(link)
        writer.write(b"x")
        await reader.readexactly(1)
        link.inject(FaultKind.CUT)
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        fresh, _ = await connect(link)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await fresh.readexactly(1)
        link.heal()
        reader, writer = await connect(link)
        writer.write(b"y")
        assert await reader.readexactly(1) == b"y"
        writer.close()


async def test_a_corrupting_link_changes_frames_of_kv_and_nothing_else() -> None:
    async with echo_behind_a_link() as link, asyncio.timeout(WAIT_S):
        link.inject(FaultKind.CORRUPT)
        reader, writer = await connect(link)
        plain, frame = bytes(400), b"12345" + MAGIC + bytes(HEADER_BYTES + 400)
        for data, changed in ((plain, 0), (frame, 1)):
            before = link.num_changed
            writer.write(data)
            echoed = await reader.readexactly(len(data))
            assert sum(a != b for a, b in zip(data, echoed, strict=True)) == link.num_changed - before >= changed
            assert echoed[:5] == data[:5]
        writer.close()


def no_abort(number: int = 0) -> PlannedRequest:
    return PlannedRequest(number=number, at_s=0.0, case=0)


async def answer(router: ScriptedRouter) -> Followed:
    """The router's answer, judged against tokens 0, 1, 2, 3."""
    case = plan(1).cases[0]
    with ScriptedRouter() as sound:
        async with AsyncClient(sound.address) as client:
            expected = await client.generate([1], max_tokens=4)
    with router:
        async with AsyncClient(router.address) as client:
            followed = Followed(planned=no_abort(), expected=expected)
            await followed.run(client, case)
            return followed


async def scripted(*messages: inference_pb2.GenerateResponse) -> Followed:
    async def script(request: inference_pb2.GenerateRequest) -> AsyncIterator[inference_pb2.GenerateResponse]:
        for message in (started(), *messages, finished()):
            yield message

    return await answer(ScriptedRouter(script))


async def test_the_judge_sees_wrong_missing_and_lost_answers() -> None:
    good = await scripted(*map(token, range(4)))
    changed = token(2)
    changed.tokens.token_ids[0] = 99
    wrong = await scripted(token(0), token(1), changed, token(3))
    short = await scripted(token(0), token(1))
    repeated = await scripted(token(0), token(1), token(1), token(2), token(3))

    async def refuse(request: inference_pb2.GenerateRequest) -> AsyncIterator[inference_pb2.GenerateResponse]:
        raise SplitserveError("no")
        yield

    lost = await answer(ScriptedRouter(refuse))
    assert (good.outcome, good.num_wrong, good.num_duplicates) == ("answered", 0, 0)
    assert wrong.num_wrong == 1
    assert short.num_wrong == 1
    assert repeated.outcome == "failed"  # the SDK itself refuses a token twice
    assert lost.outcome == "failed"
    counts = {"faults": 0, "corrupted": 0, "seconds": 1.0}
    assert judge([good], {"decode-0": 0}, {"router-0": 0}, **counts).good
    for bad in (wrong, short, repeated, lost):
        assert not judge([good, bad], {}, {}, **counts).good
    assert not judge([good], {"decode-0": 1}, {}, **counts).good
    assert not judge([good], {}, {"router-0": 1}, **counts).good


@pytest.mark.chaos
@pytest.mark.timeout(400)
def test_nothing_is_lost_repeated_wrong_orphaned_or_stuck_in_a_short_run() -> None:
    command = [sys.executable, "-m", "splitserve.benchmarks.chaos", "--seed", str(SEED)]
    command += ["--requests", "100", "--faults", "8", "--seconds", "24", "--rate", "4"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=390, check=False)
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
    assert "8 faults" in run.stdout
