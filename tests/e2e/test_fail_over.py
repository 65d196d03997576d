"""Answers of every kind go on exactly when the worker that decodes them, or the router that streams them, is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import urllib.request
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio
from splitserve.benchmarks.processes import ProcessCluster, process_cluster
from splitserve.client import AsyncClient, FinishReason, GenerationResult, RetryPolicy
from splitserve.core.config import load_config
from splitserve.core.request import seed_of_key
from splitserve.deploy.process import Endpoint
from splitserve.proto import inference_pb2, worker_pb2, worker_pb2_grpc
from splitserve.proto.inference_pb2_grpc import RouterAdminStub

WAIT_S = 120.0
NUM_TOKENS = 400  # of an answer that is struck in its middle
KEY = "names the seed"
NO_RETRY = RetryPolicy(max_attempts=1)
STREAMED = 5  # tokens that each client has when the blow falls
SAMPLED = {"temperature": 1.0, "seed": 7}
NUM_GROUPS = 90
SCHEMA = {
    "type": "string",
    "pattern": f"^([a-z]{{3}}-){{{NUM_GROUPS}}}$",
}  # where a hyphen is due only the grammar knows
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"ignore_eos": True, "seed": 1},
    "penalties": {
        **SAMPLED,
        "ignore_eos": True,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": {65: 3.0},
    },
    "json schema": {"json_schema": SCHEMA, "temperature": 0.7, "seed": 3, "max_tokens": 1_990},
    "logprobs": {**SAMPLED, "ignore_eos": True, "logprobs": 3, "prompt_logprobs": 1},
    # Half of the vocabulary ends the answer, but not before min_tokens.
    "min_tokens": {**SAMPLED, "ignore_eos": True, "min_tokens": 350, "stop_token_ids": list(range(0, 256, 2))},
    "stop string": {**SAMPLED, "ignore_eos": True},  # the string comes from an undisturbed answer
    "seed of a key": {"temperature": 1.0, "ignore_eos": True, "seed": seed_of_key(KEY)},
}


def prompt(number: int) -> list[int]:
    return [5 + (number * 31 + 7 * i) % 200 for i in range(50)]


@dataclass
class Followed:
    """One streamed answer."""

    options: Mapping[str, Any]
    number: int  # of its prompt
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    indices: list[int] = field(default_factory=list)

    async def follow(self, client: AsyncClient) -> GenerationResult:
        options = {"max_tokens": NUM_TOKENS, "timeout_s": 2 * WAIT_S, **self.options}
        async with client.stream(prompt(self.number), **options) as stream:
            async for chunk in stream:
                self.indices += range(chunk.index, chunk.index + len(chunk.token_ids))
                if len(self.indices) >= STREAMED:
                    self.begun.set()
            return await stream.result()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ProcessCluster]:
    pools = {"prefill.replicas": 1, "decode.replicas": 2, "router.replicas": 2, "router.no_worker_wait_s": WAIT_S}
    engine = {"engine.num_kv_blocks": 1024, "engine.self_check": False, "engine.dtype": "float32"}
    config = load_config(None, {"model": str(tiny), **pools, **engine})
    async with process_cluster(config, tmp_path_factory.mktemp("fail-over")) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def wanted(cluster: ProcessCluster) -> dict[str, GenerationResult]:
    """The undisturbed answer of each kind."""
    async with AsyncClient(cluster.router.address) as client:
        followed = {name: Followed(options, number) for number, (name, options) in enumerate(KINDS.items())}
        async with asyncio.timeout(WAIT_S):
            told = await asyncio.gather(*(each.follow(client) for each in followed.values()))
            answers = dict(zip(followed, told, strict=True))
            text = answers["stop string"].text
            at = next(n for n in range(len(text) // 2, len(text)) if text.find(text[n : n + 6]) == n)
            KINDS["stop string"]["stop"] = [text[at : at + 6]]
            number = list(KINDS).index("stop string")
            answers["stop string"] = await Followed(KINDS["stop string"], number).follow(client)
    assert answers["stop string"].text == text[:at]
    assert json.loads(answers["json schema"].text).count("-") == NUM_GROUPS
    assert answers["min_tokens"].finish_reason is FinishReason.STOP
    assert 350 <= len(answers["min_tokens"].token_ids) < NUM_TOKENS
    return answers


async def use(cluster: ProcessCluster, *decodes: str) -> None:
    """Both routers know these decode workers only, and have a session with the first of them."""
    addresses = [cluster.workers[name].address for name in decodes]
    request = inference_pb2.SetWorkersRequest(
        prefill_addresses=[cluster.workers["prefill-0"].address], decode_addresses=addresses
    )
    for router in cluster.routers:
        async with grpc.aio.insecure_channel(router.address) as channel:
            await RouterAdminStub(channel).SetWorkers(request, timeout=WAIT_S)
        async with AsyncClient(router.address) as client:
            while addresses[0] not in {w.address for w in (await client.status()).workers if w.state == "ready"}:
                await asyncio.sleep(0.02)


async def begin(followed: list[Followed], client: AsyncClient) -> asyncio.Future[list[GenerationResult]]:
    """Returns when every stream has begun."""
    answers = asyncio.gather(*(each.follow(client) for each in followed))
    for each in followed:
        await each.begun.wait()
    return answers


def check_same(answer: GenerationResult, wanted: GenerationResult, followed: Followed) -> None:
    assert answer.token_ids == wanted.token_ids
    assert followed.indices == list(range(len(wanted.token_ids)))
    assert (answer.text, answer.finish_reason, answer.seed) == (wanted.text, wanted.finish_reason, wanted.seed)
    for mine, theirs in ((answer.logprobs, wanted.logprobs), (answer.prompt_logprobs, wanted.prompt_logprobs)):
        assert [row.token_id for row in mine] == [row.token_id for row in theirs]
        assert [row.logprob for row in mine] == pytest.approx([row.logprob for row in theirs], abs=1e-3)


async def idle(cluster: ProcessCluster) -> None:
    """No worker that lives holds anything for anybody."""
    for name in ("prefill-0", "decode-0"):
        async with grpc.aio.insecure_channel(cluster.workers[name].address) as channel:
            stub = worker_pb2_grpc.WorkerAdminStub(channel)
            while is_busy((await stub.GetWorkerStatus(worker_pb2.GetWorkerStatusRequest(), timeout=WAIT_S)).status):
                await asyncio.sleep(0.02)


def is_busy(status: worker_pb2.WorkerStatus) -> bool:
    held = status.num_blocks - status.num_free_blocks - status.num_cached_blocks
    return held + status.num_running + status.num_waiting + status.num_held > 0


@pytest.mark.chaos
@pytest.mark.timeout(400)
@pytest.mark.asyncio(loop_scope="module")
async def test_every_kind_of_answer_survives_its_decode_worker(
    cluster: ProcessCluster, wanted: dict[str, GenerationResult]
) -> None:
    """Sampler, penalties, stop strings, min_tokens, logprobs and grammar are what they would have been."""
    followed = [Followed(options, number) for number, options in enumerate(KINDS.values())]
    async with asyncio.timeout(WAIT_S), AsyncClient(cluster.router.address, retry=NO_RETRY) as client:
        await use(cluster, "decode-1")
        answers = await begin(followed, client)
        os.kill(cluster.workers["decode-1"].pid, signal.SIGSTOP)  # it gets no further while the other one joins
        await use(cluster, "decode-0", "decode-1")
        os.kill(cluster.workers["decode-1"].pid, signal.SIGKILL)
        for name, each, answer in zip(KINDS, followed, await answers, strict=True):
            check_same(answer, wanted[name], each)
            assert answer.timing.attempts == 2
        await idle(cluster)


@pytest.mark.chaos
@pytest.mark.timeout(400)
@pytest.mark.asyncio(loop_scope="module")
async def test_every_kind_of_answer_survives_its_router(
    cluster: ProcessCluster, wanted: dict[str, GenerationResult]
) -> None:
    """Two routers side by side; the SDK goes from the one that is killed to the other."""
    names = [name for name in KINDS if name != "seed of a key"] * 2
    followed = [Followed(KINDS[name], list(KINDS).index(name)) for name in names]
    keyed = {"temperature": 1.0, "ignore_eos": True, "idempotency_key": KEY}  # no seed: both routers know it
    followed.append(Followed(keyed, list(KINDS).index("seed of a key")))
    async with asyncio.timeout(WAIT_S), AsyncClient([each.address for each in cluster.routers]) as client:
        await use(cluster, "decode-0")
        answers = await begin(followed, client)
        os.kill(cluster.router.pid, signal.SIGKILL)
        for name, each, answer in zip([*names, "seed of a key"], followed, await answers, strict=True):
            check_same(answer, wanted[name], each)
        assert await metric(cluster.routers[1], 'splitserve_takeovers_total{kind="claimed"}') > 1
        await idle(cluster)


async def metric(process: Endpoint, name: str) -> float:
    text = await asyncio.to_thread(urllib.request.urlopen, f"http://{process.metrics_address}/metrics", None, WAIT_S)
    rows = dict(row.rsplit(" ", 1) for row in text.read().decode().splitlines() if not row.startswith("#"))
    return float(rows.get(name, 0.0))
