"""The operator's commands against a cluster of processes."""

from __future__ import annotations

import asyncio
import json

import pytest
from splitserve.benchmarks.processes import ProcessCluster
from splitserve.cli.main import app
from splitserve.client import AsyncClient
from typer.testing import CliRunner, Result


async def run(*words: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, app, list(words))


@pytest.mark.asyncio(loop_scope="session")
async def test_a_worker_is_drained_by_name_and_put_back(served: ProcessCluster) -> None:
    router = served.router.address
    drained = await run("drain", "decode-0", "--timeout", "0", "--address", router)
    assert drained.exit_code == 0, drained.output
    assert "decode-0 is drained" in drained.output
    back = await run("drain", "decode-0", "--undo", "--address", router)
    assert back.exit_code == 0, back.output
    async with AsyncClient(router) as client:
        assert (await client.generate([5, 6], max_tokens=2)).token_ids
    unknown = await run("drain", "decode-7", "--address", router)
    assert unknown.exit_code == 2
    assert "decode-0, prefill-0" in unknown.output


@pytest.mark.asyncio(loop_scope="session")
async def test_the_doctor_finds_nothing_wrong_and_says_who_does_not_answer(served: ProcessCluster) -> None:
    well = await run("doctor", "--router", served.router.address)
    assert well.exit_code == 0, well.output
    assert "2 workers, nothing wrong" in well.output
    one = await run("doctor", "--worker", served.workers["prefill-0"].address, "--json")
    assert json.loads(one.stdout)["workers"][0]["name"] == "prefill-0"
    gone = await run("doctor", "--worker", "127.0.0.1:1")
    assert gone.exit_code == 1
    assert "does not answer" in gone.output


@pytest.mark.asyncio(loop_scope="session")
async def test_switch_says_when_there_is_nothing_to_do(served: ProcessCluster) -> None:
    same = await run("switch", "decode-0", "--role", "decode", "--address", served.router.address)
    assert same.exit_code == 0, same.output
    assert "was a decode worker already" in same.output
