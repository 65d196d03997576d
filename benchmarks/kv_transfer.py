"""How fast does KV move between two processes? Each transport beside memcpy and raw TCP, in one run.

python -m splitserve.benchmarks.kv_transfer
python -m splitserve.benchmarks.kv_transfer --device cuda --beside-decode
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import secrets
import socket
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Literal

import grpc.aio
import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..core.kv_geometry import KvDtype, KvGeometry, LayerGeometry
from ..core.request import Request
from ..deploy.roles import role_environment
from ..engine.pool import KvPool
from ..kv_transfer.codecs import CodecName
from ..kv_transfer.grants import KvSource
from ..kv_transfer.identity import WorkerIdentity, current_host_id
from ..kv_transfer.receiver import KvReceiver
from ..kv_transfer.sender import KvSender
from ..proto.rpc import SERVER_OPTIONS
from ..proto.server import run as run_on_uvloop
from .report import write_json

# name of a row: transport and codec
WAYS: dict[str, tuple[str, CodecName]] = {
    "shared_memory": ("shared_memory", "none"),
    "gloo": ("gloo", "none"),
    "grpc": ("grpc", "none"),
    "grpc, fp8": ("grpc", "fp8"),
    "grpc, int8": ("grpc", "int8"),
}
LIMITS = ("memcpy", "raw TCP")
WARM_UP = 2
BLOCK_SIZE = 16
PREFILL_BOOT = "benchmark"


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """One transfer: wall-clock, and CPU of both processes together."""

    seconds: float
    cpu_s: float


Figures = dict[int, dict[str, list[Taken]]]  # by size in bytes and row


def smollm2(dtype: KvDtype) -> KvGeometry:
    """KV shape of SmolLM2-135M."""
    layer = LayerGeometry(num_kv_heads=3, key_dim=64, value_dim=64)
    return KvGeometry(model_id="smollm2-135m", layers=(layer,) * 30, dtype=dtype)


def main(
    mib: Annotated[list[int] | None, typer.Option(min=1, help="MiB of one transfer; repeat it for several.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Transfers measured, per size and row.")] = 9,
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option(help="cuda: between two GPUs, KV of the Llama-3.1-8B shape.")
    ] = "cpu",
    dtype: Annotated[KvDtype, typer.Option(help="On cpu: float32, bfloat16 or float16.")] = "float32",
    ways: Annotated[str, typer.Option(help="On cuda: transports, with commas.")] = "cuda_ipc,nccl,grpc",
    gpus: Annotated[
        tuple[int, int],
        typer.Option(help="On cuda: of the two sides; one twice shows what the hosts take."),
    ] = (0, 1),
    in_flight: Annotated[int, typer.Option(min=1, help="On cuda: transfers at a time, of the sustained figure.")] = 4,
    beside_decode: Annotated[
        bool, typer.Option("--beside-decode", help="On cuda: time a decode-like step beside each transport.")
    ] = False,
    step_seconds: Annotated[float, typer.Option(help="Of steps beside each transport.")] = 5.0,
    ctas: Annotated[int | None, typer.Option(help="On cuda: multiprocessors of NCCL.", show_default="16")] = None,
    frame_mib: Annotated[int | None, typer.Option(help="On cuda: MiB of an NCCL frame.", show_default="256")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
) -> None:
    """GB/s of each transport, from the call of receive() to verified KV in the receiver's blocks.

    Gather, scatter, checksums and codecs are included; bytes are those of uncoded KV, so rows compare. Sizes are 1, 8,
    64 and 512 MiB unless given; on GPUs 8, 64, 256 and 1024.

    $ python -m splitserve.benchmarks.kv_transfer --mib 64 --mib 1024 --json kv.json

    $ python -m splitserve.benchmarks.kv_transfer --device cuda --mib 256 --beside-decode
    """
    if device == "cuda":
        from .device_kv_transfer import plan_of, run

        if gpus[0] == gpus[1] and "nccl" in ways.split(","):
            raise typer.BadParameter("NCCL wants a GPU for each side; leave it out of --ways", param_hint="--gpus")

        seconds, frame_bytes = step_seconds if beside_decode else 0.0, frame_mib and frame_mib << 20
        sizes_mib = mib or (8, 64, 256, 1024)
        tuning = {"max_ctas": ctas, "frame_bytes": frame_bytes}
        run(plan_of(sizes_mib, rounds, ways.split(","), in_flight, seconds, gpus, **tuning), json_file)
        return
    per_token = smollm2(dtype).bytes_per_token
    sizes = [(number << 20) // per_token for number in mib or (1, 8, 64, 512)]  # in tokens
    os.environ.update(role_environment(1))  # what a worker gets; both processes inherit it
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    sender = spawn.Process(target=_sender, args=(theirs, dtype, max(sizes)), daemon=True)
    sender.start()
    try:
        with ProcessPoolExecutor(1, mp_context=spawn) as receiver:
            figures = receiver.submit(_receiver, ours, dtype, sizes, rounds).result()
    finally:
        sender.terminate()
        sender.join()
    for num_bytes, found in figures.items():
        _print(num_bytes, found, f"{num_bytes // per_token} tokens, {dtype}, n={rounds}")
    if json_file is not None:
        rows = [
            {"num_bytes": size, "way": name, "seconds": [t.seconds for t in taken], "cpu_s": [t.cpu_s for t in taken]}
            for size, found in figures.items()
            for name, taken in found.items()
        ]
        write_json(json_file, {"warm_up": WARM_UP, "n": rounds, "dtype": dtype, "rows": rows})


def _print(num_bytes: int, rows: dict[str, list[Taken]], what: str) -> None:
    p50 = {name: statistics.median(one.seconds for one in taken) for name, taken in rows.items()}
    table = Table(title=f"{num_bytes / 2**20:.0f} MiB of SmolLM2 KV ({what})")
    for column in ("", "GB/s p50", "ms p50", "ms worst", "CPU s/GB", "x memcpy", "x raw TCP"):
        table.add_column(column, justify="right" if column else "left")
    for name, taken in rows.items():
        table.add_row(
            name,
            f"{num_bytes / 1e9 / p50[name]:.2f}",
            f"{1e3 * p50[name]:.1f}",
            f"{1e3 * max(one.seconds for one in taken):.1f}",
            f"{statistics.median(one.cpu_s for one in taken) / (num_bytes / 1e9):.2f}",
            *(f"{p50[limit] / p50[name]:.2f}" for limit in LIMITS),
        )
    Console().print(table)


def _sender(control: Connection, dtype: KvDtype, num_tokens: int) -> None:
    run_on_uvloop(_serve(control, dtype, num_tokens))


async def _serve(control: Connection, dtype: KvDtype, num_tokens: int) -> None:
    """The prefill side: whatever is asked for was computed long ago."""
    pool = _pool(dtype, num_tokens, seed=1)
    identity = WorkerIdentity(worker_id="prefill", boot_id=PREFILL_BOOT, host_id=current_host_id())
    sender = KvSender(pool, identity, release=lambda _: None)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    sender.register(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    raw = socket.create_server(("127.0.0.1", 0))
    control.send((port, raw.getsockname()[1]))
    table = list(range(pool.num_blocks))
    payload = pool.rows.numpy().data.cast("B")
    while (grant := await asyncio.to_thread(control.recv)) is not None:
        if grant == "cpu":
            control.send(time.process_time())
            continue
        if isinstance(grant, int):
            await asyncio.to_thread(_send_raw, raw, payload[:grant])
            continue
        sender.offer(grant, range(grant.num_tokens), lambda _: table)
        sender.kv_written(grant.request_id, 0, pool.geometry.num_layers, 0, grant.num_tokens)
        sender.finish(grant.request_id, 0, final=False)
        control.send("ready")


def _send_raw(listener: socket.socket, payload: memoryview) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(1)
        connection.sendall(payload)


def _receiver(control: Connection, dtype: KvDtype, sizes: list[int], rounds: int) -> Figures:
    return run_on_uvloop(_measure(control, dtype, sizes, rounds))


async def _measure(control: Connection, dtype: KvDtype, sizes: list[int], rounds: int) -> Figures:
    pool = _pool(dtype, max(sizes), seed=2)
    port, raw_port = control.recv()
    identity = WorkerIdentity(worker_id="decode", boot_id="d", host_id=current_host_id())
    receivers = {
        name: KvReceiver(pool, replace(identity, boot_id=name), transports=[transport], codec=codec)
        for name, (transport, codec) in WAYS.items()
    }
    buffer = np.zeros(max(sizes) * pool.geometry.bytes_per_token, dtype=np.uint8)
    table = torch.randperm(pool.num_blocks).tolist()
    figures: Figures = {}
    for num_tokens in sizes:
        num_bytes = num_tokens * pool.geometry.bytes_per_token
        rows = figures[num_bytes] = {name: [] for name in (*LIMITS, *WAYS)}
        for number in track(range(rounds + WARM_UP), f"{num_bytes / 2**20:.0f} MiB"):
            taken = {"memcpy": _copy(pool, buffer[:num_bytes])}
            taken["raw TCP"] = _receive_raw(control, raw_port, buffer[:num_bytes])
            for name, receiver in receivers.items():
                taken[name] = await _transfer(control, receiver, WAYS[name][0], f"127.0.0.1:{port}", num_tokens, table)
            if number >= WARM_UP:
                for name, one in taken.items():
                    rows[name].append(one)
    for receiver in receivers.values():
        await receiver.close()
    control.send(None)
    return figures


async def _transfer(
    control: Connection, receiver: KvReceiver, transport: str, address: str, num_tokens: int, table: list[int]
) -> Taken:
    prompt = tuple(range(num_tokens))
    request = Request(request_id=secrets.token_hex(8), prompt_token_ids=prompt, max_tokens=1)
    source = KvSource(address=address, boot_id=PREFILL_BOOT)
    grant = receiver.make_grant(request, source, receiver.choose_wire(source, num_tokens), 0)
    control.send(grant)
    control.recv()
    clock = _Clock(control)
    received = await receiver.receive(grant, address, prompt, table)
    taken = clock.stop()
    assert received.transport == transport, "another transport was taken than was to be measured"
    await receiver.commit(grant, address, received)
    return taken


class _Clock:
    """Wall-clock, and CPU of both processes."""

    def __init__(self, control: Connection) -> None:
        self._control = control
        self._cpu_s = self._cpu()
        self._began_s = time.perf_counter()

    def stop(self) -> Taken:
        seconds = time.perf_counter() - self._began_s
        return Taken(seconds=seconds, cpu_s=self._cpu() - self._cpu_s)

    def _cpu(self) -> float:
        self._control.send("cpu")
        theirs: float = self._control.recv()
        return theirs + time.process_time()


def _copy(pool: KvPool, buffer: NDArray[np.uint8]) -> Taken:
    """The limit of shared memory: one copy of as many bytes."""
    source = pool.rows.numpy().reshape(-1)[: len(buffer)]
    began_s, cpu_s = time.perf_counter(), time.process_time()
    np.copyto(buffer, source)
    return Taken(seconds=time.perf_counter() - began_s, cpu_s=time.process_time() - cpu_s)


def _receive_raw(control: Connection, port: int, buffer: NDArray[np.uint8]) -> Taken:
    """The limit of everything that goes over loopback: bytes from memory to memory, nothing else."""
    clock = _Clock(control)
    control.send(len(buffer))
    with socket.create_connection(("127.0.0.1", port)) as connection:
        view, position = buffer.data, 0
        began_s = time.perf_counter()
        connection.send(b"g")
        while position < len(buffer):
            position += connection.recv_into(view[position:])
        seconds = time.perf_counter() - began_s
    return Taken(seconds=seconds, cpu_s=clock.stop().cpu_s)


def _pool(dtype: KvDtype, num_tokens: int, *, seed: int) -> KvPool:
    pool = KvPool(smollm2(dtype), num_blocks=-(-num_tokens // BLOCK_SIZE), block_size=BLOCK_SIZE, shared=True)
    random = torch.Generator().manual_seed(seed)
    pool.elements.copy_(torch.randn(pool.elements.shape, generator=random))  # numbers: a codec refuses NaN
    return pool


if __name__ == "__main__":
    typer.run(main)
