"""Rank 0's way to the ranks that move their own KV (rank_agent.py): offers, fetches and what became of them."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..core.errors import SplitserveError, from_code
from ..kv_transfer.fetching import Received
from ..kv_transfer.grants import Grant
from ..kv_transfer.ranges import KvLayout
from ..kv_transfer.ranks import Endpoint
from ..proto.tls import Tls

LINE_LIMIT = 1 << 26  # bytes of a line: a million token ids
ENTRY = "splitserve.worker.rank_agent"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSettings:
    """What every rank of a worker has in common: the ranks are one worker, with one name and one boot."""

    worker_id: str
    boot_id: str
    host_id: str
    host: str
    transports: tuple[str, ...]
    lease_s: float
    tls: Tls | None

    def to_json(self) -> dict[str, object]:
        files = None if self.tls is None else {name: str(path) for name, path in asdict(self.tls).items() if path}
        return {**asdict(self), "tls": files}

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> RankSettings:
        files = written["tls"]
        tls = None if files is None else Tls(**{name: Path(path) for name, path in files.items()})
        return cls(**{**written, "transports": tuple(written["transports"]), "tls": tls})


def received_from_json(written: Mapping[str, Any]) -> Received:
    return Received(**{**written, "digest": bytes.fromhex(written["digest"])})


class RankLink:
    """One other rank, as source and as target of KV. If its process ends, so does this one.

    `on_released` and `on_failed` are called with the ids of offered requests; who offers sets them.
    """

    def __init__(self, link: socket.socket) -> None:
        self.on_released: Callable[[str], None] = lambda _: None
        self.on_failed: Callable[[str], None] = lambda _: None
        self._link = link
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._num_asked = 0
        self._reading: asyncio.Task[None] | None = None

    async def start(self, layout: KvLayout, secret: bytes) -> str:
        """Tell the rank what the model's KV looks like, and the granter's secret.

        Returns the address that its KV is fetched from.
        """
        reader, self._writer = await asyncio.open_connection(sock=self._link, limit=LINE_LIMIT)
        self._say(shape=layout.to_proto().SerializeToString().hex(), secret=secret.hex())
        address: str = json.loads(await reader.readline())["address"]
        self._reading = asyncio.create_task(self._read(reader))
        return address

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._writer.close()

    # -- as a source rank --

    def expect(self, request_id: str) -> None:
        """Not told: the rank sees by itself which requests are computed."""

    def offer(
        self,
        request_id: str,
        grants: Sequence[Grant],
        token_ids: Sequence[int],
        block_table: Callable[[str], Sequence[int]],
    ) -> None:
        """Never raises: a rank that refuses says so by `failed` and `released`. It knows the block table by itself."""
        self._do("offer", request_id=request_id, grants=_written(grants), token_ids=list(token_ids))

    def finish(self, request_id: str, first_token_id: int, *, final: bool, at_s: float | None = None) -> None:
        self._do("finish", request_id=request_id, first_token_id=first_token_id, final=final, at_s=at_s)

    def fail(self, request_id: str, error: SplitserveError) -> None:
        self._do("fail", request_id=request_id, code=error.code, message=error.message)

    def forget(self, request_id: str) -> None:
        self._do("forget", request_id=request_id)

    # -- as a target rank --

    async def receive(
        self,
        grants: Sequence[Grant],
        source: Endpoint,
        token_ids: Sequence[int],
        block_ids: Sequence[int],
        on_end: Callable[[], None] = lambda: None,
    ) -> list[Received]:
        """Returns, raises or is cancelled when nothing writes to the rank's blocks any more."""
        answer = self._ask(
            "receive",
            **_way(grants, source),
            token_ids=list(token_ids),
            block_ids=list(block_ids),
        )
        number = self._num_asked
        cancelled: asyncio.CancelledError | None = None
        while not answer.done():
            try:
                await asyncio.wait({answer})
            except asyncio.CancelledError as error:
                if cancelled is None:
                    self._do("cancel", number=number)
                cancelled = error
        if cancelled is not None:
            raise cancelled
        told = answer.result()
        if "code" in told:
            raise from_code(told["code"], told["message"])
        return [received_from_json(share) for share in told["received"]]

    async def commit(self, grants: Sequence[Grant], source: Endpoint, received: Sequence[Received]) -> None:
        shares = [{**asdict(share), "digest": share.digest.hex()} for share in received]
        await self._ask("commit", **_way(grants, source), received=shares)

    # -- inside --

    def _ask(self, what: str, **message: object) -> asyncio.Future[dict[str, Any]]:
        self._num_asked += 1
        answer = self._answers[self._num_asked] = asyncio.get_running_loop().create_future()
        self._do(what, number=self._num_asked, **message)
        return answer

    def _do(self, what: str, **message: object) -> None:
        self._say(do=what, **message)

    def _say(self, **message: object) -> None:
        self._writer.write((json.dumps(message) + "\n").encode())

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            told = json.loads(line)
            if "answer" in told:
                self._answers.pop(told["answer"]).set_result(told)
            elif "released" in told:
                self.on_released(told["released"])
            else:
                self.on_failed(told["failed"])


def _way(grants: Sequence[Grant], source: Endpoint) -> dict[str, object]:
    return {"grants": _written(grants), "addresses": source.addresses, "boot_ids": source.boot_ids}


def _written(grants: Sequence[Grant]) -> list[str]:
    return [grant.to_proto().SerializeToString().hex() for grant in grants]
