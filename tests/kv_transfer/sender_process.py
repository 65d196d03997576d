"""A prefill side in a process of its own, for tests that kill it: commands on stdin, one line of answer to each."""

from __future__ import annotations

import asyncio
import os
import sys
import threading

import grpc.aio
from conftest import TinyPool
from splitserve.core.errors import Unavailable
from splitserve.kv_transfer.grants import Grant
from splitserve.kv_transfer.identity import WorkerIdentity, current_host_id
from splitserve.kv_transfer.sender import KvSender

NUM_TOKENS = 100


def answer(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def main() -> None:
    pool = TinyPool()
    identity = WorkerIdentity(worker_id="p", boot_id="prefill-boot", host_id=current_host_id())
    sender = KvSender(pool, identity, release=lambda _: None)
    server = grpc.aio.server()
    sender.register(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    while line := await asyncio.to_thread(sys.stdin.readline):
        command, *rest = line.split()
        if command in ("address", "inode"):
            answer(f"127.0.0.1:{port}" if command == "address" else str(os.fstat(pool.fd).st_ino))
            continue
        grant_id, epoch = rest
        grant = Grant(
            grant_id=grant_id,
            request_id="r1",
            attempt=1,
            epoch=int(epoch),
            decode_boot_id="decode-boot",
            prefill_boot_id="prefill-boot",
            geometry_digest=pool.geometry.digest(),
            num_cached_tokens=0,
            num_tokens=NUM_TOKENS,
            lease_s=30.0,
            codec="none",
            wire_dtype=pool.geometry.dtype,
        )
        sender.fail("r1", Unavailable("replaced by the next command"))
        packing = threading.Event()

        def block_table(_: str, packing: threading.Event = packing) -> list[int]:
            packing.set()
            return list(range(pool.num_blocks))

        sender.offer(grant, range(1, NUM_TOKENS + 1), block_table)
        written = NUM_TOKENS if command == "all" else NUM_TOKENS // 2
        sender.kv_written("r1", 0, pool.geometry.num_layers, 0, written)
        if command == "all":
            sender.finish("r1", 7, final=False)
        else:  # the test's receiver has opened its Fetch: wait until KV is on its way
            await asyncio.to_thread(packing.wait)
        answer("ok")


asyncio.run(main())
