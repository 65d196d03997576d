"""Processes that die: each request ends in an answer or a typed error, and no block stays behind."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import grpc.aio
import pytest
from splitserve.benchmarks.processes import ProcessCluster, process_cluster
from splitserve.client import AsyncClient, GenerationResult, RetryPolicy, SplitserveError
from splitserve.core.config import load_config
from splitserve.proto import worker_pb2, worker_pb2_grpc

PROMPTS = [[5 + (n * 31 + 7 * i) % 200 for i in range(60)] for n in range(40)]
WAIT_S = 40.0
OPTIONS = {"max_tokens": 150, "ignore_eos": True, "temperature": 1.0, "seed": 5, "timeout_s": 60.0}


async def statuses(cluster: ProcessCluster, dead: list[str]) -> dict[str, worker_pb2.WorkerStatus]:
    found = {}
    for name, worker in cluster.workers.items():
        if name not in dead:
            async with grpc.aio.insecure_channel(worker.address) as channel:
                stub = worker_pb2_grpc.WorkerAdminStub(channel)
                found[name] = (await stub.GetWorkerStatus(worker_pb2.GetWorkerStatusRequest(), timeout=10)).status
    return found


@pytest.mark.chaos
@pytest.mark.timeout(180)
async def test_sigkill_of_any_worker_leaves_an_answer_or_a_typed_error_for_each_request(
    tiny: Path, tmp_path: Path
) -> None:
    sizes = {"prefill.replicas": 2, "decode.replicas": 2, "engine.num_kv_blocks": 1024, "engine.self_check": False}
    config = load_config(None, {"model": str(tiny), **sizes})
    dead: list[str] = []
    async with (
        process_cluster(config, tmp_path) as cluster,
        AsyncClient(cluster.router.address, retry=RetryPolicy(max_attempts=1)) as client,
    ):
        wanted = [(await client.generate(p, **OPTIONS)).token_ids for p in PROMPTS[:3]]
        for victim in ("prefill-0", "decode-0"):
            tasks = [asyncio.create_task(client.generate(p, **OPTIONS)) for p in PROMPTS]
            while not (await statuses(cluster, dead))[victim].num_running:
                await asyncio.sleep(0.01)
            os.kill(cluster.workers[victim].pid, signal.SIGKILL)
            dead.append(victim)
            async with asyncio.timeout(WAIT_S):  # nothing hangs
                results = await asyncio.gather(*tasks, return_exceptions=True)
            check(results, wanted)
            async with asyncio.timeout(WAIT_S):
                while any(is_busy(status) for status in (await statuses(cluster, dead)).values()):
                    await asyncio.sleep(0.02)


def check(results: list[GenerationResult | BaseException], wanted: list[tuple[int, ...]]) -> None:
    """Each is an answer or a typed error, and an answer that survived the kill has the tokens of an undisturbed one."""
    answers = [result for result in results if isinstance(result, GenerationResult)]
    errors = [result for result in results if not isinstance(result, GenerationResult)]
    assert all(isinstance(error, SplitserveError) for error in errors), errors
    assert len(answers) > len(results) // 2, errors
    for result, tokens in zip(results, wanted, strict=False):
        assert not isinstance(result, GenerationResult) or result.token_ids == tokens


def is_busy(status: worker_pb2.WorkerStatus) -> bool:
    held = status.num_blocks - status.num_free_blocks - status.num_cached_blocks
    return held + status.num_running + status.num_waiting + status.num_held > 0
