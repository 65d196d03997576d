"""Makes the frames of outgoing transfers: KV packed from its blocks, or the blocks' numbers, behind a header."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..core.errors import TransferFailed
from .channel import Lane
from .codecs import WireFormat
from .frames import HEADER_BYTES, FrameHeader, FrameKind, KvPart, checksum, new_frame
from .framing import Framing
from .grants import Grant
from .host_copies import Ids
from .layout import PoolBytes
from .pool import KvPool
from .staging import Staging
from .wire import WireBytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Apart:
    """KV for a lane: its header waits for a turn."""

    header: FrameHeader
    payload: Tensor


Packed = bytes | Apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How one transfer's frames go; lane and staging where payloads go apart."""

    framing: Framing
    lane: Lane | None = None
    staging: Staging | None = None
    round: int = 0  # of the transfer's streams: more than one if it was resumed


class Packer:
    """Of one pool. Holds no state of its own: `checksum` runs in threads, and so does `pack` where it moves KV."""

    def __init__(self, pool: KvPool, pool_bytes: PoolBytes) -> None:
        self._pool = pool
        self._bytes = pool_bytes
        self._raw = WireFormat(codec="none", dtype=pool.geometry.dtype)  # what a mapped pool holds

    def pack(
        self,
        grant: Grant,
        block_table: Callable[[str], Sequence[int]],
        wire_bytes: WireBytes,
        part: KvPart,
        sequence: int,
        way: Way,
    ) -> Packed:
        """One frame of KV. Raises: TransferFailed: its blocks are gone. KvCorrupted: a value cannot be coded."""
        table = self._table(grant, block_table, part)
        if way.framing.mapped:
            ids = self._block_ids(part, table)
            payload = ids.tobytes()
            header = _header(grant, FrameKind.DATA, part, self._raw, sequence, len(payload), 0, way.round)
            return header.pack() + payload
        if way.staging is not None:
            apart, value = way.staging.pack(wire_bytes, part, table)
            size = apart.numel()
            header = _header(grant, FrameKind.APART, part, grant.wire, sequence, size, value, way.round)
            return Apart(header=header, payload=apart)
        frame, view = new_frame(HEADER_BYTES + wire_bytes.part_bytes(part))
        body = view[HEADER_BYTES:]
        value = wire_bytes.pack(part, table, body)
        header = _header(grant, FrameKind.DATA, part, grant.wire, sequence, body.nbytes, value, way.round)
        view[:HEADER_BYTES] = np.frombuffer(header.pack(), dtype=np.uint8)
        return frame

    def checksum(self, grant: Grant, block_table: Callable[[str], Sequence[int]], part: KvPart) -> int:
        """Of a part's blocks; it comes with END."""
        return self._bytes.checksum(part, self._block_ids(part, self._table(grant, block_table, part)))

    def control(
        self, grant: Grant, kind: FrameKind, sequence: int, payload: bytes = b"", *, round_number: int = 0
    ) -> bytes:
        """A frame without KV."""
        whole = KvPart(
            layer_start=0,
            layer_end=self._pool.geometry.num_layers,
            head_start=0,
            head_end=0,
            token_start=grant.num_cached_tokens,
            token_end=grant.num_tokens,
        )
        value = checksum(payload)
        return _header(grant, kind, whole, grant.wire, sequence, len(payload), value, round_number).pack() + payload

    def _table(self, grant: Grant, block_table: Callable[[str], Sequence[int]], part: KvPart) -> Sequence[int]:
        try:
            table, size = block_table(grant.request_id), self._pool.block_size
        except KeyError:
            raise TransferFailed(f"{grant}: its blocks were freed while they were sent") from None
        if len(table) * size < part.token_end:
            raise TransferFailed(f"{grant}: its blocks hold {len(table) * size} tokens, not {part.token_end}")
        return table

    def _block_ids(self, part: KvPart, table: Sequence[int]) -> Ids:
        size = self._pool.block_size
        return np.asarray(table[part.token_start // size : -(-part.token_end // size)], dtype="<u4")


def _header(
    grant: Grant, kind: FrameKind, part: KvPart, wire: WireFormat, sequence: int, size: int, value: int, number: int
) -> FrameHeader:
    return FrameHeader(
        kind=kind,
        grant_id=grant.grant_id,
        attempt=grant.attempt,
        epoch=grant.epoch,
        part=part,
        wire=wire,
        sequence=sequence,
        payload_bytes=size,
        checksum=value,
        round=number,
    )
