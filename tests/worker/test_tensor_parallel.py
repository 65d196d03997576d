"""A worker of two ranks as the real command: it answers as one rank does, and ends when either rank ends."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import pytest
import torch
from splitserve.core.request import Request
from splitserve.engine.engine import Engine
from splitserve.engine.loading import load_model
from splitserve.engine.options import EngineOptions
from splitserve.engine.parallel.ranks import EXIT_RANK_LOST
from splitserve.proto import worker_pb2, worker_pb2_grpc
from splitserve.proto.convert import PROTOCOL_VERSION, request_to_proto
from splitserve.proto.rpc import CHANNEL_OPTIONS

from .conftest import WAIT_S, End

PROMPT = tuple(range(3, 60))
NEW_TOKENS = 6


@dataclass
class Worker:
    process: subprocess.Popen[bytes]
    log: Path
    address: str

    @property
    def other_rank(self) -> int:
        """Process id of rank 1."""
        (child,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(child)


StartWorker = Callable[[str], Worker]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def start_worker(model_dir: Path, tmp_path: Path) -> Iterator[StartWorker]:
    processes: list[subprocess.Popen[bytes]] = []

    def start(device: str) -> Worker:
        if device == "cuda" and torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        ready, log = os.pipe(), tmp_path / "log"
        command = [sys.executable, "-c", "from splitserve.cli.main import main; main()", "-v", "decode-worker"]
        command += ["--role", "colocated", "--tensor-parallel", "2", "--model", str(model_dir), "--threads", "1"]
        command += ["--device", device, "--dtype", "float32", "--max-model-len", "256", "--max-running", "8"]
        command += ["--num-kv-blocks", "32", "--no-self-check", "--ready-file", f"/dev/fd/{ready[1]}"]
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, pass_fds=(ready[1],))
        processes.append(process)
        os.close(ready[1])
        with os.fdopen(ready[0]) as lines:
            line = lines.readline()
        assert line, log.read_text()
        return Worker(process, log, json.loads(line)["address"])

    yield start
    for process in processes:
        process.kill()
        process.wait()


def ended(pid_fd: int) -> bool:
    """Whether the process of a pidfd ends within the bound."""
    return bool(select.select([pid_fd], [], [], WAIT_S)[0])


async def answer(address: str) -> list[int]:
    async with AsyncExitStack() as stack:
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS))
        end = End(channel, worker_pb2_grpc.DecodeWorkerStub(channel).DecodeSession(), worker_pb2.DecodeSessionRequest)
        await end.send(hello=worker_pb2.RouterHello(protocol_version=PROTOCOL_VERSION, router_id="test"))
        await end.next("hello")
        request = Request(request_id="r", prompt_token_ids=PROMPT, max_tokens=NEW_TOKENS)
        await end.send(run=worker_pb2.RunLocal(request=request_to_proto(request, 60.0)))
        tokens: list[int] = []
        while len(tokens) < NEW_TOKENS:
            (sequence,) = (await end.next("tokens")).sequences
            tokens += sequence.token_ids
        return tokens


def alone(model_dir: Path) -> list[int]:
    """What one rank answers."""
    options = EngineOptions(model=str(model_dir), num_kv_blocks=32, num_threads=1)
    engine = Engine(load_model(options), options)
    engine.add(Request(request_id="r", prompt_token_ids=PROMPT, max_tokens=NEW_TOKENS))
    tokens: list[int] = []
    while (output := engine.step()) is not None:
        tokens += [token.token_id for token in output.tokens]
    return tokens


@pytest.mark.parametrize("device", DEVICES)
def test_a_killed_rank_ends_its_worker_at_once_with_the_reason(
    device: str, start_worker: StartWorker, model_dir: Path
) -> None:
    worker = start_worker(device)
    assert asyncio.run(answer(worker.address)) == alone(model_dir)
    killed = worker.other_rank
    os.kill(killed, signal.SIGKILL)
    assert worker.process.wait(timeout=WAIT_S) == EXIT_RANK_LOST
    assert f"rank 1 (process {killed}) of the tensor-parallel group was killed by SIGKILL" in worker.log.read_text()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)])
def test_no_rank_outlives_its_worker(device: str, number: signal.Signals, code: int, start_worker: StartWorker) -> None:
    worker = start_worker(device)
    other = os.pidfd_open(worker.other_rank)
    try:
        worker.process.send_signal(number)
        assert worker.process.wait(timeout=WAIT_S) == code
        assert ended(other)
    finally:
        os.close(other)
