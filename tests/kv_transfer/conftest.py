"""A small pool, and a sender and a receiver joined by a real gRPC server."""

from __future__ import annotations

import asyncio
import fcntl
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import torch
from splitserve.core.kv_geometry import KvGeometry, LayerGeometry
from splitserve.core.metrics import WorkerMetrics, new_registry
from splitserve.core.request import Request
from splitserve.kv_transfer.codecs import CodecName
from splitserve.kv_transfer.fetching import Received
from splitserve.kv_transfer.frames import SERVICE
from splitserve.kv_transfer.gloo import GlooRendezvous
from splitserve.kv_transfer.grants import Grant, KvSource
from splitserve.kv_transfer.identity import WorkerIdentity, current_host_id
from splitserve.kv_transfer.receiver import KvReceiver
from splitserve.kv_transfer.sender import KvSender
from splitserve.proto import kv_transfer_pb2
from splitserve.proto.rpc import SERVER_OPTIONS

# Layers differ in everything that may differ; prime sizes show every mixed-up stride.
GEOMETRY = KvGeometry(
    model_id="tiny",
    layers=(
        LayerGeometry(num_kv_heads=2, key_dim=4, value_dim=4),
        LayerGeometry(num_kv_heads=2, key_dim=4, value_dim=4),
        LayerGeometry(num_kv_heads=3, key_dim=5, value_dim=7),
        LayerGeometry(num_kv_heads=3, key_dim=7, value_dim=5, sliding_window=8),
    ),
    dtype="float32",
)


DEVICE_TRANSPORTS = ("cuda_ipc", "nccl")


def devices(transport: str) -> tuple[str, str]:
    """Where the prefill and the decode side keep their KV."""
    return ("cuda:0", "cuda:1") if transport in DEVICE_TRANSPORTS else ("cpu", "cpu")


class TinyPool:
    """KvPool in a sealed memfd or in a GPU's memory, as the engine makes it."""

    def __init__(
        self, block_size: int = 16, num_blocks: int = 24, geometry: KvGeometry = GEOMETRY, device: str = "cpu"
    ) -> None:
        self.geometry, self.block_size, self.num_blocks = geometry, block_size, num_blocks
        self.row_bytes = geometry.bytes_per_token * block_size
        self.size_bytes = self.row_bytes * num_blocks
        self.fd: int | None = None
        if device != "cpu":
            dtype = getattr(torch, geometry.dtype)
            shape = (num_blocks, self.row_bytes // dtype.itemsize)
            self.data = torch.rand(shape).to(dtype).to(device)
            torch.cuda.synchronize(device)
            return
        self.fd = os.memfd_create("tiny-kv", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.size_bytes)
        memory = mmap.mmap(self.fd, self.size_bytes)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | 0x10)  # FUTURE_WRITE
        self.data = torch.frombuffer(memory, dtype=getattr(torch, geometry.dtype)).view(num_blocks, -1)
        self.data.copy_(torch.rand(self.data.shape))

    def keys(self, layer: int) -> torch.Tensor:
        return self._view(layer, key=True)

    def values(self, layer: int) -> torch.Tensor:
        return self._view(layer, key=False)

    def _view(self, layer: int, *, key: bool) -> torch.Tensor:
        shape = self.geometry.layers[layer]
        before = sum(other.elements_per_token for other in self.geometry.layers[:layer])
        before += 0 if key else shape.num_kv_heads * shape.key_dim
        dim = shape.key_dim if key else shape.value_dim
        stop = (before + shape.num_kv_heads * dim) * self.block_size
        flat = self.data[:, before * self.block_size : stop]
        return flat.view(self.num_blocks, shape.num_kv_heads, self.block_size, dim)

    def tokens(self, block_table: list[int], start: int, end: int) -> list[torch.Tensor]:
        """All planes of a token range as [heads, tokens, dim]."""
        planes = [view(layer) for layer in range(self.geometry.num_layers) for view in (self.keys, self.values)]
        return [plane[block_table].transpose(0, 1).flatten(1, 2)[:, start:end].cpu().clone() for plane in planes]

    def snapshot(self) -> torch.Tensor:
        return self.data.cpu().clone()

    def clear(self) -> None:
        """All zero, also for what works on other streams."""
        self.data.zero_()
        if self.data.is_cuda:
            torch.cuda.synchronize(self.data.device)

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


@dataclass(kw_only=True)
class Pair:
    """One prefill and one decode side, each with its pool, over a real server on a free port."""

    source: TinyPool
    target: TinyPool
    sender: KvSender
    receiver: KvReceiver
    server: grpc.aio.Server
    address: str
    sender_metrics: WorkerMetrics
    receiver_metrics: WorkerMetrics
    released: list[str] = field(default_factory=list)
    reports: list[tuple[str, Exception]] = field(default_factory=list)
    release_seen: asyncio.Event = field(default_factory=asyncio.Event)
    source_table: list[int] = field(default_factory=list)
    target_table: list[int] = field(default_factory=list)

    def request(self, num_tokens: int, request_id: str = "r1", attempt: int = 1) -> Request:
        tokens = tuple(range(1, num_tokens + 1))
        return Request(request_id=request_id, prompt_token_ids=tokens, max_tokens=4, attempt=attempt)

    def grant(
        self,
        request: Request,
        num_cached_tokens: int = 0,
        *,
        codec: CodecName = "none",
        address: str | None = None,
        boot_id: str = "prefill-boot",
    ) -> Grant:
        source = KvSource(address=address or self.address, boot_id=boot_id, dtype=self.source.geometry.dtype)
        wire = replace(self.receiver.choose_wire(source, request.num_tokens), codec=codec)
        return self.receiver.make_grant(request, source, wire, num_cached_tokens)

    def offer(self, grant: Grant, request: Request) -> None:
        self.sender.offer(grant, request.prompt_token_ids, lambda _: self.source_table)

    def receive(self, grant: Grant, request: Request) -> Awaitable[Received]:
        return self.receiver.receive(grant, self.address, request.prompt_token_ids, self.target_table)

    def fetch(
        self,
        grant: Grant,
        transport: int = kv_transfer_pb2.TRANSPORT_GRPC,
        proof: bytes | None = None,
        commit: kv_transfer_pb2.Commit | None = None,
    ) -> Any:
        """A raw Fetch, without a receiver. Args: proof: None: the right one."""
        channel = grpc.aio.insecure_channel(self.address)
        method = channel.unary_stream(
            f"/{SERVICE}/Fetch", request_serializer=kv_transfer_pb2.FetchRequest.SerializeToString
        )
        shown = self.receiver._granter.proof(grant) if proof is None else proof
        return method(
            kv_transfer_pb2.FetchRequest(grant=grant.to_peer(), transport=transport, proof=shown, commit=commit)
        )

    def complete(self, grant: Grant, request: Request) -> None:
        """Offer it with everything written and its first token known."""
        self.offer(grant, request)
        self.write_all(grant)
        self.sender.finish(grant.request_id, 7, final=False)

    def write_all(self, grant: Grant) -> None:
        self.sender.kv_written(grant.request_id, 0, self.source.geometry.num_layers, 0, grant.num_tokens)

    def assert_arrived(self, grant: Grant) -> None:
        span = (grant.num_cached_tokens, grant.num_tokens)
        sent = self.source.tokens(self.source_table, *span)
        came = self.target.tokens(self.target_table, *span)
        assert all(torch.equal(a, b) for a, b in zip(sent, came, strict=True))


@pytest.fixture(autouse=True)
def own_memory_handles(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA maps a process's memory into others only; a sender and a receiver of one process have it already.

    Handles of other processes, which the tests that kill them use, go through CUDA.
    """
    if torch.cuda.device_count() < 2:
        return
    from splitserve.kv_transfer.cuda import CudaRuntime

    exported: dict[bytes, int] = {}
    real_export, real_open, real_close = CudaRuntime.export, CudaRuntime.open, CudaRuntime.close

    def export(self: CudaRuntime, address: int) -> tuple[bytes, int]:
        handle, offset = real_export(self, address)
        exported[handle] = address - offset
        return handle, offset

    def close(self: CudaRuntime, address: int) -> None:
        if address not in exported.values():
            real_close(self, address)

    monkeypatch.setattr(CudaRuntime, "export", export)
    monkeypatch.setattr(CudaRuntime, "open", lambda self, handle: exported.get(handle) or real_open(self, handle))
    monkeypatch.setattr(CudaRuntime, "close", close)


@pytest.fixture(scope="session", autouse=True)
def peer_access() -> None:
    """PyTorch turns it on with its first copy between two GPUs; within one process nobody else does."""
    if torch.cuda.device_count() >= 2:
        torch.ones(1, device="cuda:0").to("cuda:1").to("cuda:0")


@pytest.fixture
def tiny() -> KvGeometry:
    return GEOMETRY


class ChildProcess:
    """One side in a process of its own; its script says what it does."""

    def __init__(self, forking: socket.socket, script: str, *arguments: str) -> None:
        stdin, own_end = os.pipe()
        own_start, stdout = os.pipe()
        command = [str(Path(__file__).with_name(script)), *arguments]
        socket.send_fds(forking, [json.dumps(command).encode()], [stdin, stdout])
        os.close(stdin)
        os.close(stdout)
        self._stdin, self._stdout = os.fdopen(own_end, "w"), os.fdopen(own_start)
        self.pid = int(forking.recv(64))
        self._pid_fd = os.pidfd_open(self.pid)
        self.address = ""

    def say(self, line: str) -> str:
        self._stdin.write(line + "\n")
        self._stdin.flush()
        return self._stdout.readline().strip()

    def kill(self) -> None:
        """Returns when it is dead. Idempotent."""
        if self._stdout.closed:
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pid_fd, signal.SIGKILL)
        select.select([self._pid_fd], [], [])
        os.close(self._pid_fd)
        self._stdin.close()
        self._stdout.close()


@pytest.fixture(scope="session")
def forking() -> Iterator[socket.socket]:
    """Where processes are asked for; see forking.py."""
    own, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    script = str(Path(__file__).with_name("forking.py"))
    process = subprocess.Popen([sys.executable, script, str(its.fileno())], pass_fds=(its.fileno(),))
    its.close()
    try:
        yield own
    finally:
        own.close()
        process.kill()
        process.wait()


@pytest.fixture
def sender_process(forking: socket.socket) -> Iterator[Callable[..., ChildProcess]]:
    """`sender_process(boot_id)` starts a prefill side that can be killed."""
    started = []

    def start(boot_id: str, port: int = 0, transport: str = "grpc") -> ChildProcess:
        process = ChildProcess(forking, "sender_process.py", boot_id, str(port), devices(transport)[0])
        started.append(process)
        process.address = process.say("address")
        return process

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def receiver_process(forking: socket.socket) -> Iterator[Callable[..., ChildProcess]]:
    """`receiver_process(address, transport, num_tokens)` starts a decode side that can be killed."""
    started = []

    def start(address: str, transport: str, num_tokens: int) -> ChildProcess:
        started.append(ChildProcess(forking, "receiver_process.py", address, transport, str(num_tokens)))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def same_pool() -> Iterator[TinyPool]:
    """What sender_process.py holds."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        pool = TinyPool()
    yield pool
    pool.close()


@pytest.fixture
def impatient_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo gives up within half a second: a set-up that nobody joins, and a payload that nobody takes."""
    impatient = partial(GlooRendezvous, set_up_s=0.5, stall_s=0.5)
    monkeypatch.setattr("splitserve.kv_transfer.channels.GlooRendezvous", impatient)


@pytest.fixture
def tiny_pool() -> type[TinyPool]:
    return TinyPool


PairFactory = Callable[..., Any]


@pytest.fixture(scope="session")
def pair() -> PairFactory:
    return pair_factory()


def pair_factory() -> PairFactory:
    """`async with pair(*transports, **options) as p`: everything is closed on exit."""

    @asynccontextmanager
    async def make(
        *transports: str,
        source_block_size: int = 16,
        target_block_size: int = 16,
        sender_options: dict[str, Any] | None = None,
        receiver_options: dict[str, Any] | None = None,
        geometry: KvGeometry = GEOMETRY,
        target_geometry: KvGeometry | None = None,
        source_blocks: int = 24,
        sender_type: type[KvSender] = KvSender,
        source_device: str | None = None,
        target_device: str | None = None,
    ) -> AsyncIterator[Pair]:
        usual = devices(transports[0] if transports else "grpc")
        source = TinyPool(source_block_size, source_blocks, geometry, source_device or usual[0])
        target = TinyPool(target_block_size, 24, target_geometry or geometry, target_device or usual[1])
        released: list[str] = []
        reports: list[tuple[str, Exception]] = []
        release_seen = asyncio.Event()

        def release(request_id: str) -> None:
            released.append(request_id)
            release_seen.set()

        metrics = [WorkerMetrics(new_registry(), role) for role in ("prefill", "decode")]
        host = current_host_id()
        sender = sender_type(
            source,
            WorkerIdentity(worker_id="p", boot_id="prefill-boot", host_id=host),
            release=release,
            report=lambda request_id, error: reports.append((request_id, error)),
            metrics=metrics[0],
            **sender_options or {},
        )
        receiver = KvReceiver(
            target,
            WorkerIdentity(worker_id="d", boot_id="decode-boot", host_id=host),
            transports=transports or ("grpc",),
            metrics=metrics[1],
            **receiver_options or {},
        )
        server = grpc.aio.server(options=SERVER_OPTIONS)
        sender.register(server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        async with AsyncExitStack() as stack:
            stack.callback(source.close)
            stack.callback(target.close)
            stack.push_async_callback(server.stop, 0)
            stack.push_async_callback(sender.close)
            stack.push_async_callback(receiver.close)
            yield Pair(
                source=source,
                target=target,
                sender=sender,
                receiver=receiver,
                server=server,
                address=address,
                sender_metrics=metrics[0],
                receiver_metrics=metrics[1],
                released=released,
                reports=reports,
                release_seen=release_seen,
                source_table=torch.randperm(source.num_blocks).tolist(),
                target_table=torch.randperm(target.num_blocks).tolist(),
            )

    return make
