"""Workers of a cluster in service are restarted and change their roles, one after the other, and no request is lost."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import grpc.aio
import pytest
import pytest_asyncio
from splitserve.benchmarks.processes import ProcessCluster, process_cluster
from splitserve.client import AsyncClient, RetryPolicy
from splitserve.core.config import load_config
from splitserve.deploy.process import Endpoint
from splitserve.proto import worker_pb2, worker_pb2_grpc

WAIT_S = 120.0
GRACE_S = 120.0  # of a process; its own drain time-out is 0, so that whatever it runs is handed over
PROMPTS = [[5 + (n * 31 + 7 * i) % 200 for i in range(80)] for n in range(4)]
OPTIONS = {"max_tokens": 200, "ignore_eos": True, "temperature": 1.0, "seed": 5, "timeout_s": 240.0}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ProcessCluster]:
    """A second decode worker takes what the first hands over; prompts wait in the router for the one prefill worker."""
    pools = {"prefill.replicas": 1, "decode.replicas": 2, "drain_timeout_s": 0.0}
    engine = {"engine.num_kv_blocks": 512, "engine.self_check": False, "router.no_worker_wait_s": WAIT_S}
    config = load_config(None, {"model": str(tiny), **pools, **engine})
    async with process_cluster(config, tmp_path_factory.mktemp("lifecycle")) as started:
        yield started


@pytest_asyncio.fixture(loop_scope="module")
async def client(cluster: ProcessCluster) -> AsyncIterator[AsyncClient]:
    """One that shows every failure: it does not retry."""
    async with AsyncClient(cluster.router.address, retry=RetryPolicy(max_attempts=1)) as opened:
        yield opened


class Trickle:
    """One request after the other, all the time."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._ending = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> list[tuple[int, ...]]:
        answers = []
        while not self._ending.is_set():
            answers.append((await self._client.generate(PROMPTS[0], **OPTIONS)).token_ids)
            with suppress(TimeoutError):  # the pace: machines that start processes have little to spare
                await asyncio.wait_for(self._ending.wait(), 0.5)
        return answers

    async def end(self) -> list[tuple[int, ...]]:
        """Raises what any of them failed with."""
        self._ending.set()
        async with asyncio.timeout(WAIT_S):
            return await self._task


async def follow(client: AsyncClient, prompt: list[int], decoding: asyncio.Event) -> tuple[int, ...]:
    async with client.stream(prompt, **OPTIONS) as stream:
        async for chunk in stream:
            if chunk.index > 0:
                decoding.set()
        return (await stream.result()).token_ids


async def burst(client: AsyncClient) -> asyncio.Future[list[tuple[int, ...]]]:
    """Several requests at once; returns when each is being decoded."""
    each = [asyncio.Event() for _ in PROMPTS]
    answers = asyncio.gather(*(follow(client, p, event) for p, event in zip(PROMPTS, each, strict=True)))
    async with asyncio.timeout(WAIT_S):
        for event in each:
            await event.wait()
    return answers


async def all_ready(client: AsyncClient, num_workers: int = 3) -> None:
    """Wait until the router has a session with each worker."""
    async with asyncio.timeout(WAIT_S):
        while True:
            states = [worker.state for worker in (await client.status()).workers]
            if states == ["ready"] * num_workers:
                return
            await asyncio.sleep(0.02)


async def switch(worker: Endpoint, role: worker_pb2.Role.ValueType) -> worker_pb2.SwitchRoleResponse:
    async with grpc.aio.insecure_channel(worker.address) as channel:
        request = worker_pb2.SwitchRoleRequest(role=role, timeout_s=0.0)
        return await worker_pb2_grpc.WorkerAdminStub(channel).SwitchRole(request, timeout=WAIT_S)


async def roles(client: AsyncClient) -> dict[str, str]:
    """Of the workers that are ready, by name."""
    return {worker.worker_id: worker.role for worker in (await client.status()).workers if worker.state == "ready"}


async def becomes(client: AsyncClient, expected: dict[str, str]) -> None:
    async with asyncio.timeout(WAIT_S):
        while await roles(client) != expected:
            await asyncio.sleep(0.02)


async def metric(process: Endpoint, name: str) -> float:
    url = f"http://{process.metrics_address}/metrics"
    text = (await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=WAIT_S).read())).decode()
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))


@pytest.mark.timeout(600)
@pytest.mark.asyncio(loop_scope="module")
async def test_every_worker_is_restarted_under_load_and_no_request_is_lost(
    cluster: ProcessCluster, client: AsyncClient
) -> None:
    await all_ready(client)
    wanted = [(await client.generate(prompt, **OPTIONS)).token_ids for prompt in PROMPTS]
    boots = {name: worker.boot_id for name, worker in cluster.workers.items()}
    trickle = Trickle(client)
    for name in list(cluster.workers):
        answers = await burst(client)
        ended = await cluster.restart(name, GRACE_S)
        assert ended.returncode == 0, ended.log_tail
        assert await answers == wanted
        await all_ready(client)
    assert set(await trickle.end()) == {wanted[0]}
    status = await client.status()
    assert (status.num_failed, status.num_live) == (0, 0)
    assert not any(cluster.workers[name].boot_id == boot for name, boot in boots.items())
    assert await metric(cluster.router, "splitserve_handed_over_attempts_total") >= 2


@pytest.mark.verify
@pytest.mark.timeout(600)
@pytest.mark.asyncio(loop_scope="module")
async def test_a_worker_changes_its_role_and_back_under_load_and_every_answer_is_exact(
    cluster: ProcessCluster, client: AsyncClient
) -> None:
    """decode-1 becomes a prefill worker, so that prefill-0 may become a decode worker, and both go back."""
    known = {"prefill-0": "prefill", "decode-0": "decode", "decode-1": "decode"}
    await becomes(client, known)
    wanted = [(await client.generate(prompt, **OPTIONS)).token_ids for prompt in PROMPTS]
    boots = {worker.boot_id for worker in cluster.workers.values()}
    for name, role in (
        ("decode-1", "prefill"),
        ("prefill-0", "decode"),
        ("prefill-0", "prefill"),
        ("decode-1", "decode"),
    ):
        answers = await burst(client)
        pid = cluster.workers[name].pid
        switched = await switch(cluster.workers[name], worker_pb2.Role.Value(f"ROLE_{role.upper()}"))
        assert switched.switch_s > 0
        assert switched.info.pid == pid
        assert switched.info.boot_id not in boots
        boots.add(switched.info.boot_id)
        known[name] = role
        await becomes(client, known)
        assert await answers == wanted
        assert await (await burst(client)) == wanted
    status = await client.status()
    assert (status.num_failed, status.num_live) == (0, 0)
