"""What moves KV in a rank other than 0: it does as rank 0 tells it over a socket, and serves and fetches for itself.

Rank 0 decides; a rank packs, sends, fetches and verifies its own heads. The two exchange lines of JSON.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import threading
from collections import OrderedDict
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from ..core.errors import Cancelled, EngineFailed, SplitserveError, from_code
from ..core.threads import share_interpreter
from ..engine.parallel import follower
from ..engine.pool import KvPool
from ..kv_transfer.capability import Granter
from ..kv_transfer.grants import Grant
from ..kv_transfer.identity import WorkerIdentity
from ..kv_transfer.ranges import KvLayout
from ..kv_transfer.ranks import Endpoint, RankReceiver
from ..kv_transfer.receiver import KvReceiver
from ..kv_transfer.sender import KvSender
from ..kv_transfer.source_ranks import RankSender
from ..proto import kv_transfer_pb2
from ..proto.server import RpcServer
from .rank_links import LINE_LIMIT, RankSettings, received_from_json

logger = logging.getLogger(__name__)

_NUM_FORGOTTEN = 4096


class RankAgent:
    """Lives on an event loop in a thread of its own. Implements `KvMover`, which the device's thread calls."""

    def __init__(self, settings: RankSettings, rank: int, link: socket.socket) -> None:
        self._settings = settings
        self._rank = rank
        self._link = link
        self._lock = threading.Lock()  # of the two below: steps and offers come on different ways
        self._tables: dict[str, Sequence[int]] = {}  # of sequences whose KV leaves this rank
        self._forgotten: OrderedDict[str, None] = OrderedDict()  # a step may still report one
        self._arriving: dict[int, asyncio.Task[dict[str, object]]] = {}

    # -- the device's thread --

    def serve(self, pool: KvPool) -> None:
        threading.Thread(target=self._run, args=(pool,), name="kv-agent", daemon=True).start()

    def _run(self, pool: KvPool) -> None:
        try:
            asyncio.run(self._serve(pool))
        except Exception:
            logger.critical("no KV can be moved any more, so this rank ends", exc_info=True)
            os._exit(1)

    def started(self, request_id: str, block_table: Sequence[int]) -> None:
        with self._lock:
            if request_id not in self._forgotten:
                self._tables[request_id] = block_table
                self._sender.expect(request_id)

    def kv_written(self, request_id: str, layer_start: int, layer_end: int, token_start: int, token_end: int) -> None:
        self._sender.kv_written(request_id, layer_start, layer_end, token_start, token_end)

    # -- the event loop --

    async def _serve(self, pool: KvPool) -> None:
        """Until rank 0 is gone, and this process with it."""
        reader, self._writer = await asyncio.open_connection(sock=self._link, limit=LINE_LIMIT)
        told = json.loads(await reader.readline())
        shape = kv_transfer_pb2.KvShape.FromString(bytes.fromhex(told["shape"]))
        layout, settings = KvLayout.from_proto(shape), self._settings
        identity = WorkerIdentity(worker_id=settings.worker_id, boot_id=settings.boot_id, host_id=settings.host_id)
        server = RpcServer(settings.host, 0, ("splitserve.v1.KvTransfer",), tls=settings.tls)

        def make_sender(release: Any, report: Any) -> KvSender:
            sender = KvSender(
                pool,
                identity,
                release=release,
                report=report,
                layout=layout,
                rank=self._rank,
                host=settings.host,
                lease_s=settings.lease_s,
            )
            sender.register(server.server)
            return sender

        self._sender = RankSender(make_sender, release=self._released, report=self._failed)
        self._receiver = KvReceiver(
            pool,
            identity,
            transports=settings.transports,
            layout=layout,
            rank=self._rank,
            granter=Granter(bytes.fromhex(told["secret"])),
            tls=settings.tls,
        )
        self._arrivals = RankReceiver(self._receiver)
        await server.start()
        self._say(address=server.address)
        while line := await reader.readline():
            self._handle(json.loads(line))

    def _handle(self, message: dict[str, Any]) -> None:
        match message.pop("do"):
            case "offer":
                self._offer(**message)
            case "finish":
                self._sender.finish(**message)
            case "fail":
                self._sender.fail(message["request_id"], from_code(message["code"], message["message"]))
            case "forget":
                self._forget(message["request_id"])
            case "receive":
                self._begin(message.pop("number"), self._receive(**message))
            case "commit":
                self._begin(message.pop("number"), self._commit(**message))
            case "cancel":
                if (task := self._arriving.get(message["number"])) is not None:
                    task.cancel()

    def _say(self, **message: object) -> None:
        self._writer.write((json.dumps(message) + "\n").encode())

    # -- KV that leaves --

    def _offer(self, request_id: str, grants: Sequence[str], token_ids: Sequence[int]) -> None:
        try:
            self._sender.offer(request_id, [_grant(grant) for grant in grants], token_ids, self._table)
        except SplitserveError as error:
            self._failed(request_id, error)
            self._released(request_id)

    def _table(self, request_id: str) -> Sequence[int]:
        """Raises: KeyError: no step has reached the request here, or it is over."""
        with self._lock:
            return self._tables[request_id]

    def _forget(self, request_id: str) -> None:
        with self._lock:
            self._tables.pop(request_id, None)
            self._sender.forget(request_id)
            self._forgotten[request_id] = None
            if len(self._forgotten) > _NUM_FORGOTTEN:
                self._forgotten.popitem(last=False)

    def _released(self, request_id: str) -> None:
        self._say(released=request_id)

    def _failed(self, request_id: str, error: SplitserveError) -> None:
        self._say(failed=request_id, code=error.code, message=error.message)

    # -- KV that arrives --

    def _begin(self, number: int, work: Coroutine[Any, Any, dict[str, object]]) -> None:
        task = self._arriving[number] = asyncio.create_task(work)
        task.add_done_callback(partial(self._answer, number))  # also if it is cancelled before it began

    def _answer(self, number: int, task: asyncio.Task[dict[str, object]]) -> None:
        del self._arriving[number]
        error = Cancelled("rank 0 gave the transfer up") if task.cancelled() else task.exception()
        if error is None:
            self._say(answer=number, **task.result())
            return
        if not isinstance(error, SplitserveError):
            logger.error("moving KV failed", exc_info=error)
            error = EngineFailed(f"rank {self._rank} failed while it moved KV; see its log")
        self._say(answer=number, code=error.code, message=error.message)

    async def _receive(
        self,
        grants: Sequence[str],
        addresses: Sequence[str],
        boot_ids: Sequence[str],
        token_ids: Sequence[int],
        block_ids: Sequence[int],
    ) -> dict[str, object]:
        source = Endpoint(addresses=tuple(addresses), boot_ids=tuple(boot_ids))
        received = await self._arrivals.receive([_grant(grant) for grant in grants], source, token_ids, block_ids)
        return {"received": [{**asdict(share), "digest": share.digest.hex()} for share in received]}

    async def _commit(
        self,
        grants: Sequence[str],
        addresses: Sequence[str],
        boot_ids: Sequence[str],
        received: Sequence[Mapping[str, Any]],
    ) -> dict[str, object]:
        source = Endpoint(addresses=tuple(addresses), boot_ids=tuple(boot_ids))
        shares = [received_from_json(share) for share in received]
        await self._arrivals.commit([_grant(grant) for grant in grants], source, shares)
        return {}


def _grant(written: str) -> Grant:
    return Grant.from_proto(kv_transfer_pb2.Grant.FromString(bytes.fromhex(written)))


def main() -> None:
    """Be a rank whose KV moves between workers; see the follower's `main`."""
    share_interpreter()

    def make(settings: Mapping[str, Any], rank: int, link: int) -> RankAgent:
        return RankAgent(RankSettings.from_json(settings), rank, socket.socket(fileno=link))

    follower.main(make)
