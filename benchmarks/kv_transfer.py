"""How fast does KV move between two processes? Each transport against raw TCP over loopback, in one run.

python -m splitserve.benchmarks.kv_transfer --mib 64
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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import grpc.aio
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..core.kv_geometry import DTYPE_BYTES, KvDtype, KvGeometry, LayerGeometry
from ..core.request import Request
from ..deploy.roles import role_environment
from ..engine.pool import KvPool
from ..kv_transfer.grants import KvSource
from ..kv_transfer.identity import WorkerIdentity, current_host_id
from ..kv_transfer.receiver import KvReceiver
from ..kv_transfer.sender import KvSender
from ..proto.rpc import SERVER_OPTIONS
from .report import write_json

TRANSPORTS = ("grpc", "shared_memory")
WARM_UP = 2
BLOCK_SIZE = 16
PREFILL_BOOT = "benchmark"


def smollm2(dtype: KvDtype) -> KvGeometry:
    """KV shape of SmolLM2-135M."""
    layer = LayerGeometry(num_kv_heads=3, key_dim=64, value_dim=64)
    return KvGeometry(model_id="smollm2-135m", layers=(layer,) * 30, dtype=dtype)


def main(
    mib: Annotated[int, typer.Option(min=1, help="MiB of KV in one transfer.")] = 64,
    rounds: Annotated[int, typer.Option(min=3, help="Transfers measured, per transport.")] = 15,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
) -> None:
    """GB/s of each transport, from the call of receive() to verified KV in the receiver's blocks."""
    kv_dtype: KvDtype = next(name for name in DTYPE_BYTES if name == dtype)
    num_tokens = (mib << 20) // smollm2(kv_dtype).bytes_per_token
    os.environ.update(role_environment(1))  # what a worker gets; both processes inherit it
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    sender = spawn.Process(target=_sender, args=(theirs, kv_dtype, num_tokens), daemon=True)
    sender.start()
    try:
        with ProcessPoolExecutor(1, mp_context=spawn) as receiver:
            figures = receiver.submit(_receiver, ours, kv_dtype, num_tokens, rounds).result()
    finally:
        sender.terminate()
        sender.join()
    num_bytes = num_tokens * smollm2(kv_dtype).bytes_per_token
    speed = {name: num_bytes / 1e9 / statistics.median(seconds) for name, seconds in figures.items()}
    table = Table(title=f"{num_bytes / 2**20:.0f} MiB of SmolLM2 KV ({num_tokens} tokens, {dtype}), n={rounds}")
    for column in ("", "GB/s p50", "ms p50", "ms worst", "x raw TCP"):
        table.add_column(column, justify="right" if column else "left")
    for name, seconds in figures.items():
        p50, worst = 1e3 * statistics.median(seconds), 1e3 * max(seconds)
        ratio = speed[name] / speed["raw TCP"]
        table.add_row(name, f"{speed[name]:.2f}", f"{p50:.1f}", f"{worst:.1f}", f"{ratio:.2f}")
    Console().print(table)
    if json_file is not None:
        write_json(
            json_file, {"num_bytes": num_bytes, "warm_up": WARM_UP, "n": rounds, "seconds": figures, "gb_per_s": speed}
        )


def _sender(control: Connection, dtype: KvDtype, num_tokens: int) -> None:
    asyncio.run(_serve(control, dtype, num_tokens))


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
    payload = pool.rows.numpy().tobytes()[: num_tokens * pool.geometry.bytes_per_token]
    while (grant := await asyncio.to_thread(control.recv)) is not None:
        if grant == "tcp":
            await asyncio.to_thread(_send_raw, raw, payload)
            continue
        sender.offer(grant, range(num_tokens), lambda _: table)
        sender.kv_written(grant.request_id, 0, pool.geometry.num_layers, 0, num_tokens)
        sender.finish(grant.request_id, 0, final=False)
        control.send("ready")


def _send_raw(listener: socket.socket, payload: bytes) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(1)
        connection.sendall(payload)


def _receiver(control: Connection, dtype: KvDtype, num_tokens: int, rounds: int) -> dict[str, list[float]]:
    return asyncio.run(_measure(control, dtype, num_tokens, rounds))


async def _measure(control: Connection, dtype: KvDtype, num_tokens: int, rounds: int) -> dict[str, list[float]]:
    pool = _pool(dtype, num_tokens, seed=2)
    port, raw_port = control.recv()
    identity = WorkerIdentity(worker_id="decode", boot_id="d", host_id=current_host_id())
    receivers = {name: KvReceiver(pool, identity, transports=[name]) for name in TRANSPORTS}
    buffer = bytearray(num_tokens * pool.geometry.bytes_per_token)
    seconds: dict[str, list[float]] = {name: [] for name in ("raw TCP", *TRANSPORTS)}
    table = torch.randperm(pool.num_blocks).tolist()
    for number in track(range(rounds + WARM_UP), "rounds"):
        taken = {"raw TCP": _receive_raw(control, raw_port, buffer)}
        for name, receiver in receivers.items():
            prompt = tuple(range(num_tokens))
            request = Request(request_id=secrets.token_hex(8), prompt_token_ids=prompt, max_tokens=1)
            address = f"127.0.0.1:{port}"
            source = KvSource(address=address, boot_id=PREFILL_BOOT)
            grant = receiver.make_grant(request, source, receiver.choose_wire(source, num_tokens), 0)
            control.send(grant)
            control.recv()
            began_s = time.perf_counter()
            received = await receiver.receive(grant, address, prompt, table)
            taken[name] = time.perf_counter() - began_s
            assert received.transport == name, "another transport was taken than was to be measured"
            await receiver.commit(grant, address, received)
        if number >= WARM_UP:
            for name, value in taken.items():
                seconds[name].append(value)
    for receiver in receivers.values():
        await receiver.close()
    control.send(None)
    return seconds


def _receive_raw(control: Connection, port: int, buffer: bytearray) -> float:
    control.send("tcp")
    with socket.create_connection(("127.0.0.1", port)) as connection:
        view, position = memoryview(buffer), 0
        began_s = time.perf_counter()
        connection.send(b"g")
        while position < len(buffer):
            position += connection.recv_into(view[position:])
        return time.perf_counter() - began_s


def _pool(dtype: KvDtype, num_tokens: int, *, seed: int) -> KvPool:
    pool = KvPool(smollm2(dtype), num_blocks=-(-num_tokens // BLOCK_SIZE), block_size=BLOCK_SIZE, shared=True)
    random = torch.Generator().manual_seed(seed)
    pool.rows.copy_(torch.randint(0, 256, pool.rows.shape, dtype=torch.uint8, generator=random))
    return pool


if __name__ == "__main__":
    typer.run(main)
