"""A TCP proxy in front of one process, which can hold, delay, cut and change what passes."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from dataclasses import dataclass, field

from ...kv_transfer.frames import HEADER_BYTES, MAGIC
from .plan import FaultKind

_CHUNK_BYTES = 1 << 16
_DELAY_S = 0.05
_REACH_BYTES = HEADER_BYTES + 128  # a changed byte is in a frame's header or at the beginning of its payload


@dataclass(slots=True, eq=False)
class _Connection:
    """One connection through the link: both of its ends."""

    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def reset(self) -> None:
        """End it as a router in between would, or a peer's kernel: not with the end of the stream."""
        for writer in self.writers:
            if not writer.transport.is_closing():
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()


class Link:
    """Listens on loopback and passes connections on to `target` (host:port), which may change."""

    def __init__(self, rng: random.Random) -> None:
        self.target = ""
        self.num_changed = 0  # frames of KV
        self._rng = rng
        self._fault: FaultKind | None = None
        self._passable = asyncio.Event()
        self._passable.set()
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)

    @property
    def address(self) -> str:
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()
        return f"{host}:{port}"

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        self.break_off()
        self._passable.set()
        await self._server.wait_closed()

    def break_off(self) -> None:
        """Reset every connection."""
        for connection in list(self._connections):
            connection.reset()

    def inject(self, fault: FaultKind) -> None:
        """Until `heal`."""
        self._fault = fault
        if fault is FaultKind.PARTITION:
            self._passable.clear()
        elif fault is FaultKind.CUT:
            self.break_off()

    def heal(self) -> None:
        """What a partition held back is delivered now, as TCP would."""
        self._fault = None
        self._passable.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection([writer])
        self._connections.add(connection)
        try:
            await self._passable.wait()
            if self._fault is FaultKind.CUT or not self.target:
                return
            host, _, port = self.target.rpartition(":")
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
            connection.writers.append(far_writer)
            pumps = [
                asyncio.create_task(self._pump(reader, far_writer)),
                asyncio.create_task(self._pump(far_reader, writer)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            connection.reset()  # gRPC ends both directions at once
            await asyncio.wait(pumps)
        except OSError:
            pass  # nobody listens there now: the caller sees a reset
        finally:
            self._connections.discard(connection)
            connection.reset()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(_CHUNK_BYTES):
                await self._passable.wait()
                if self._fault is FaultKind.DELAY:
                    await asyncio.sleep(_DELAY_S)
                if writer.is_closing():  # reset meanwhile
                    return
                writer.write(self._changed(data))
                await writer.drain()
        except OSError:
            pass  # either side is gone

    def _changed(self, data: bytes) -> bytes:
        """The same bytes, or one bit flipped in a KV frame."""
        start = data.find(MAGIC) if self._fault is FaultKind.CORRUPT else -1
        place = start + self._rng.randrange(_REACH_BYTES)
        if start < 0 or place >= len(data):
            return data
        self.num_changed += 1
        return data[:place] + bytes([data[place] ^ (1 << self._rng.randrange(8))]) + data[place + 1 :]
