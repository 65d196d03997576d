"""Processes that die: each request ends in an answer or a typed error, and no block stays behind."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import pytest
from splitserve.benchmarks.processes import ProcessCluster, process_cluster
from splitserve.client import AsyncClient, GenerationResult, RetryPolicy, SplitserveError
from splitserve.core.config import load_config
from splitserve.deploy.process import Endpoint
from splitserve.proto import worker_pb2, worker_pb2_grpc

PROMPTS = [[5 + (n * 31 + 7 * i) % 200 for i in range(240)] for n in range(40)]
STEP_TOKENS = 64  # small steps: 75 of them to prefill what one of the two workers gets
WAIT_S = 40.0
NOTICED_S = 5.0  # from the kill until each request that it hit goes on or has its error
OPTIONS = {"max_tokens": 150, "ignore_eos": True, "temperature": 1.0, "seed": 5, "timeout_s": 60.0}


async def working(victim: Endpoint, tasks: list[asyncio.Task[None]]) -> None:
    """Wait until the worker has requests of this round; fail when they all ended without it."""
    async with grpc.aio.insecure_channel(victim.address) as channel:
        stub = worker_pb2_grpc.WorkerAdminStub(channel)
        while not (await stub.GetWorkerStatus(worker_pb2.GetWorkerStatusRequest(), timeout=10)).status.num_running:
            assert not all(task.done() for task in tasks), f"no request was seen running on {victim.address}"


async def statuses(cluster: ProcessCluster, dead: list[str]) -> dict[str, worker_pb2.WorkerStatus]:
    found = {}
    for name, worker in cluster.workers.items():
        if name not in dead:
            async with grpc.aio.insecure_channel(worker.address) as channel:
                stub = worker_pb2_grpc.WorkerAdminStub(channel)
                found[name] = (await stub.GetWorkerStatus(worker_pb2.GetWorkerStatusRequest(), timeout=10)).status
    return found


@pytest.mark.verify
@pytest.mark.chaos
@pytest.mark.timeout(180)
async def test_sigkill_of_any_worker_leaves_an_answer_or_a_typed_error_for_each_request(
    tiny: Path, tmp_path: Path
) -> None:
    sizes = {"prefill.replicas": 2, "decode.replicas": 2, "engine.num_kv_blocks": 1024, "engine.self_check": False}
    sizes["engine.max_step_tokens"] = STEP_TOKENS
    config = load_config(None, {"model": str(tiny), **sizes})
    dead: list[str] = []
    async with (
        process_cluster(config, tmp_path) as cluster,
        AsyncClient(cluster.router.address, retry=RetryPolicy(max_attempts=1)) as client,
    ):
        wanted = [(await client.generate(p, **OPTIONS)).token_ids for p in PROMPTS[:3]]
        for victim in ("prefill-0", "decode-0"):
            requests = [Followed() for _ in PROMPTS]
            tasks = [asyncio.create_task(f.follow(client, p)) for f, p in zip(requests, PROMPTS, strict=True)]
            await working(cluster.workers[victim], tasks)
            os.kill(cluster.workers[victim].pid, signal.SIGKILL)
            killed_s = time.monotonic()
            dead.append(victim)
            async with asyncio.timeout(WAIT_S):  # nothing hangs
                await asyncio.gather(*tasks)
            check([request.outcome for request in requests], wanted)
            hit = [request for request in requests if request.was_hit]
            assert hit
            assert max(request.next_event_s(killed_s) for request in hit) < NOTICED_S
            async with asyncio.timeout(WAIT_S):
                while any(is_busy(status) for status in (await statuses(cluster, dead)).values()):
                    await asyncio.sleep(0.02)


@dataclass
class Followed:
    """One streamed request and when it made itself heard."""

    events_s: list[float] = field(default_factory=list)  # on the monotonic clock; the last is the end
    outcome: GenerationResult | BaseException | None = None

    async def follow(self, client: AsyncClient, prompt: list[int]) -> None:
        try:
            async with client.stream(prompt, **OPTIONS) as stream:
                async for _ in stream:
                    self.events_s.append(time.monotonic())
                self.outcome = await stream.result()
        except SplitserveError as error:
            self.outcome = error
        self.events_s.append(time.monotonic())

    @property
    def was_hit(self) -> bool:
        """It ended in an error or needed another worker."""
        return not isinstance(self.outcome, GenerationResult) or self.outcome.timing.attempts > 1

    def next_event_s(self, after_s: float) -> float:
        """Seconds from `after_s` to the next token, answer or error."""
        return next((at_s for at_s in self.events_s if at_s > after_s), after_s) - after_s


def check(results: list[GenerationResult | BaseException | None], wanted: list[tuple[int, ...]]) -> None:
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
