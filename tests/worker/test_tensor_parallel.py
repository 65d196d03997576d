"""A worker of two ranks as the real command: it answers as one rank does, and ends when either rank ends."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc.aio
import pytest
import torch
from splitserve.core.request import Request
from splitserve.engine.engine import Engine
from splitserve.engine.loading import load_model
from splitserve.engine.options import EngineOptions
from splitserve.engine.parallel.ranks import EXIT_RANK_LOST
from splitserve.engine.testing import make_tiny_model
from splitserve.proto import worker_pb2, worker_pb2_grpc
from splitserve.proto.convert import PROTOCOL_VERSION, request_to_proto
from splitserve.proto.rpc import CHANNEL_OPTIONS
from splitserve.worker.watchdog import EXIT_CODE

from .conftest import WAIT_S, End

PROMPT = tuple(range(3, 60))
NEW_TOKENS = 6


@dataclass
class Worker:
    process: subprocess.Popen[bytes]
    log: Path
    address: str

    @property
    def other_ranks(self) -> list[int]:
        """Process ids of all but rank 0."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(child) for child in children.split()]

    @property
    def other_rank(self) -> int:
        (rank,) = self.other_ranks
        return rank

    def ends_with_its_ranks(self, number: signal.Signals) -> int:
        """Its exit code after this signal; no rank outlives it."""
        ranks = [os.pidfd_open(rank) for rank in self.other_ranks]
        try:
            self.process.send_signal(number)
            code = self.process.wait(timeout=WAIT_S)
            assert all(map(ended, ranks))
            return code
        finally:
            for rank in ranks:
                os.close(rank)


StartWorker = Callable[..., Worker]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def start_worker(model_dir: Path, tmp_path: Path) -> Iterator[StartWorker]:
    processes: list[subprocess.Popen[bytes]] = []

    def start(device: str, role: str = "colocated", num_ranks: int = 2, *flags: str) -> Worker:
        if device == "cuda" and torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        ready, log = os.pipe(), tmp_path / f"{role}.log"
        command = [sys.executable, "-c", "from splitserve.cli.main import main; main()", "-v"]
        command += ["prefill-worker"] if role == "prefill" else ["decode-worker", "--role", role]
        command += ["--tensor-parallel", str(num_ranks), "--model", str(model_dir), "--threads", "1"]
        command += ["--device", device, "--dtype", "float32", "--max-model-len", "256", "--max-running", "8"]
        command += ["--num-kv-blocks", "32", "--no-self-check", "--ready-file", f"/dev/fd/{ready[1]}", *flags]
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
        assert (await end.next("hello")).tensor_parallel == 2
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


@pytest.mark.verify
def test_a_rank_that_hangs_ends_its_worker_and_itself_within_a_bound(start_worker: StartWorker) -> None:
    """16 s: the worker is unhealthy after 8 s without a step, and ends itself after 8 more."""
    worker = start_worker("cpu")
    assert asyncio.run(answer(worker.address))
    hanging = os.pidfd_open(worker.other_rank)
    os.kill(worker.other_rank, signal.SIGSTOP)
    try:
        with pytest.raises(grpc.aio.AioRpcError) as caught:  # what a router sees of it: the session breaks
            asyncio.run(answer(worker.address))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert worker.process.wait(timeout=WAIT_S) == EXIT_CODE
        assert ended(hanging)  # a stopped process reads no pipe and takes no signal but this one
        assert "this worker hangs and ends itself" in worker.log.read_text()
    finally:
        os.close(hanging)


@pytest.mark.verify
def test_a_slow_rank_makes_slow_tokens_and_the_same_ones(start_worker: StartWorker, model_dir: Path) -> None:
    """It runs a hundredth of the time."""
    worker = start_worker("cpu")
    assert asyncio.run(answer(worker.address))
    rank, answered = worker.other_rank, threading.Event()

    def slow_down() -> None:
        while not answered.wait(0.001):
            os.kill(rank, signal.SIGSTOP)
            time.sleep(0.099)
            os.kill(rank, signal.SIGCONT)

    slowing = threading.Thread(target=slow_down)
    slowing.start()
    try:
        assert asyncio.run(answer(worker.address)) == alone(model_dir)
    finally:
        answered.set()
        slowing.join()
    assert worker.process.poll() is None


@pytest.mark.gpu
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)])
def test_no_rank_outlives_its_worker_on_gpus(number: signal.Signals, code: int, start_worker: StartWorker) -> None:
    worker = start_worker("cuda")
    assert asyncio.run(answer(worker.address))  # so it has come to where it waits for signals
    assert worker.ends_with_its_ranks(number) == code


@asynccontextmanager
async def session(worker: Worker) -> AsyncIterator[tuple[End, worker_pb2.WorkerInfo]]:
    async with grpc.aio.insecure_channel(worker.address, options=CHANNEL_OPTIONS) as channel:
        if "prefill.log" in worker.log.name:
            call = worker_pb2_grpc.PrefillWorkerStub(channel).PrefillSession()
            end = End(channel, call, worker_pb2.PrefillSessionRequest)
        else:
            end = End(
                channel, worker_pb2_grpc.DecodeWorkerStub(channel).DecodeSession(), worker_pb2.DecodeSessionRequest
            )
        await end.send(hello=worker_pb2.RouterHello(protocol_version=PROTOCOL_VERSION, router_id="test"))
        yield end, await end.next("hello")


async def blocks(worker: Worker) -> worker_pb2.WorkerStatus:
    async with grpc.aio.insecure_channel(worker.address, options=CHANNEL_OPTIONS) as channel:
        stub = worker_pb2_grpc.WorkerAdminStub(channel)
        return (await stub.GetWorkerStatus(worker_pb2.GetWorkerStatusRequest(), timeout=WAIT_S)).status


async def idle(worker: Worker) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            status = await blocks(worker)
            if status.num_free_blocks + status.num_cached_blocks == status.num_blocks and not status.num_running:
                return
            await asyncio.sleep(0.01)


async def hand_over(prefill: Worker, decode: Worker, request: Request) -> tuple[list[int], worker_pb2.TransferDone]:
    """The answer of a split pair, driven as a router would, and what became of its transfer."""
    async with session(prefill) as (prefill_end, info), session(decode) as (decode_end, _):
        work = request_to_proto(request, 60.0)
        grant = worker_pb2.RequestGrant(
            request=work,
            kv_address=info.kv_address,
            kv_rank_addresses=info.kv_rank_addresses,
            prefill_boot_id=info.boot_id,
            prefill_kv_dtype=info.kv_dtype,
        )
        await decode_end.send(grant=grant)
        granted = await decode_end.next("grant")
        await prefill_end.send(run=worker_pb2.RunPrefill(request=work, grant=granted))
        first = await prefill_end.next("first_token")
        done = await decode_end.next("transfer_done")
        assert done.first_token_id == first.token_id
        tokens = [first.token_id]
        while len(tokens) < request.max_tokens:
            (sequence,) = (await decode_end.next("tokens")).sequences
            tokens += sequence.token_ids
    await idle(prefill)
    await idle(decode)
    return tokens, done


async def cancel_after_the_grant(prefill: Worker, decode: Worker, request: Request) -> None:
    async with session(prefill) as (prefill_end, info), session(decode) as (decode_end, _):
        work = request_to_proto(request, 60.0)
        where = {"kv_address": info.kv_address, "prefill_boot_id": info.boot_id}
        grant = worker_pb2.RequestGrant(request=work, kv_rank_addresses=info.kv_rank_addresses, **where)
        await decode_end.send(grant=grant)
        await prefill_end.send(run=worker_pb2.RunPrefill(request=work, grant=await decode_end.next("grant")))
        await decode_end.send(cancel=worker_pb2.CancelRun(request_id=request.request_id, attempt=1))
    await idle(prefill)
    await idle(decode)


MIXED = [pytest.param(2, 1, marks=pytest.mark.verify), pytest.param(1, 2, marks=pytest.mark.verify)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("p", "d"), [*MIXED, (2, 2)])
def test_kv_moves_between_workers_of_any_ranks_and_no_rank_outlives_its_worker(
    p: int, d: int, start_worker: StartWorker, model_dir: Path
) -> None:
    with ThreadPoolExecutor() as threads:  # most of a start is imports, one rank after the other
        prefill, decode = threads.map(start_worker, ("cpu", "cpu"), ("prefill", "decode"), (p, d))
    request = Request(request_id="r", prompt_token_ids=PROMPT, max_tokens=NEW_TOKENS)
    geometry = load_model(EngineOptions(model=str(model_dir), self_check=False)).geometry
    wanted = alone(model_dir)
    asyncio.run(cancel_after_the_grant(prefill, decode, replace(request, prompt_token_ids=PROMPT[::-1])))
    for name in ("first", "again"):  # the second finds a part of the prompt in both prefix caches
        tokens, done = asyncio.run(hand_over(prefill, decode, replace(request, request_id=name)))
        assert tokens == wanted
        cached = 0 if name == "first" else len(PROMPT) // 16 * 16
        assert done.num_bytes == geometry.bytes_per_token * (len(PROMPT) - cached)
    assert (len(prefill.other_ranks), len(decode.other_ranks)) == (p - 1, d - 1)
    assert decode.ends_with_its_ranks(signal.SIGKILL) == -signal.SIGKILL
    assert prefill.ends_with_its_ranks(signal.SIGTERM) == 0


@pytest.mark.verify
@pytest.mark.timeout(360)
def test_kv_heads_that_every_rank_holds_do_not_move(tmp_path: Path) -> None:
    """Phi-3 has one matrix for queries, keys and values, which the plan leaves whole."""
    model = make_tiny_model("phi3", tmp_path / "phi3")
    command = [sys.executable, "-c", "from splitserve.cli.main import main; main()", "prefill-worker"]
    command += ["--tensor-parallel", "2", "--model", str(model), "--threads", "1", "--no-self-check"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 2, ended.stderr
    assert "use colocated workers, or --tensor-parallel 1" in ended.stderr.splitlines()[-1]
