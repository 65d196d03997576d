"""A decode side in a process of its own, for tests that kill it: commands on stdin, one line of answer to each.

receiver_process.py ADDRESS TRANSPORT NUM_TOKENS
"""

from __future__ import annotations

import asyncio
import sys

from conftest import TinyPool, devices
from splitserve.core.request import Request
from splitserve.kv_transfer.grants import KvSource
from splitserve.kv_transfer.identity import WorkerIdentity, current_host_id
from splitserve.kv_transfer.receiver import KvReceiver


async def main(address: str, transport: str, num_tokens: int) -> None:
    pool = TinyPool(device=devices(transport)[1])
    identity = WorkerIdentity(worker_id="d", boot_id="decode-child", host_id=current_host_id())
    receiver = KvReceiver(pool, identity, transports=(transport,))
    request = Request(request_id="r1", prompt_token_ids=tuple(range(1, num_tokens + 1)), max_tokens=4)
    source = KvSource(address=address, boot_id="prefill-boot")
    grant = receiver.make_grant(request, source, receiver.choose_wire(source, num_tokens), 0)
    tasks = []
    while line := await asyncio.to_thread(sys.stdin.readline):
        text = "ok"
        receiving = receiver.receive(grant, address, request.prompt_token_ids, list(range(pool.num_blocks)))
        match line.strip():
            case "grant":
                receiving.close()
                text = grant.to_proto().SerializeToString().hex()
            case "open":
                tasks.append(asyncio.create_task(receiving))
            case "receive":
                await receiving
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
