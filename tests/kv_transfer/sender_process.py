"""A prefill side in a process of its own, for tests that kill it: commands on stdin, one line of answer to each.

sender_process.py BOOT_ID PORT DEVICE
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading

import grpc.aio
import torch
from conftest import TinyPool
from splitserve.core.errors import Unavailable
from splitserve.kv_transfer.grants import Grant
from splitserve.kv_transfer.identity import WorkerIdentity, current_host_id
from splitserve.kv_transfer.sender import KvSender
from splitserve.proto import kv_transfer_pb2
from splitserve.proto.rpc import SERVER_OPTIONS


def answer(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def main(boot_id: str, port: int, device: str) -> None:
    torch.manual_seed(7)  # the test makes the same pool
    pool = TinyPool(device=device)
    identity = WorkerIdentity(worker_id="p", boot_id=boot_id, host_id=current_host_id())
    sender = KvSender(pool, identity, release=lambda _: None)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    sender.register(server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    while line := await asyncio.to_thread(sys.stdin.readline):
        command, *rest = line.split()
        if command in ("address", "inode"):
            answer(f"127.0.0.1:{bound}" if command == "address" else str(os.fstat(pool.fd).st_ino))
            continue
        grant = Grant.from_proto(kv_transfer_pb2.Grant.FromString(bytes.fromhex(rest[0])))
        sender.fail(grant.request_id, Unavailable("replaced by the next command"))
        packing = threading.Event()

        def block_table(_: str, packing: threading.Event = packing) -> list[int]:
            packing.set()
            return list(range(pool.num_blocks))

        sender.offer(grant, range(1, grant.num_tokens + 1), block_table)
        if command == "half":  # the test's receiver has opened its Fetch: wait until KV is on its way
            sender.kv_written(grant.request_id, 0, pool.geometry.num_layers, 0, grant.num_tokens // 2)
            await asyncio.to_thread(packing.wait)
        elif command == "all":
            sender.kv_written(grant.request_id, 0, pool.geometry.num_layers, 0, grant.num_tokens)
            sender.finish(grant.request_id, 7, final=False)
        answer("ok")


asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
