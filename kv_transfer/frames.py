"""What travels in a Fetch stream: a fixed binary header and a payload in one `bytes`; checksums and the digest."""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..core.errors import KvCorrupted
from ..core.kv_geometry import KvDtype
from .codecs import CodecName, WireFormat
from .grants import Grant

SERVICE = "splitserve.v1.KvTransfer"
MAGIC = b"SSKV"
VERSION = 3
# magic, version, kind, codec, grant id, attempt, epoch, layers, heads, tokens, sequence, payload bytes, checksum, turn,
# dtype, round, -
_HEADER = struct.Struct("<4sHBB16sIIHHHHIIIIQIBB2x")
HEADER_BYTES = _HEADER.size  # 72
_CODECS: tuple[CodecName, ...] = ("none", "fp8", "int8")  # numbered by place; only ever appended to
_DTYPES: tuple[KvDtype, ...] = ("float32", "bfloat16", "float16")

_bytes_new = ctypes.pythonapi.PyBytes_FromStringAndSize
_bytes_new.argtypes, _bytes_new.restype = (ctypes.c_void_p, ctypes.c_ssize_t), ctypes.py_object
_bytes_address = ctypes.pythonapi.PyBytes_AsString
_bytes_address.argtypes, _bytes_address.restype = (ctypes.py_object,), ctypes.c_void_p


class FrameKind(IntEnum):
    WAIT = 1  # nothing is ready, the sender is alive; not part of the sequence
    DATA = 2  # KV (gRPC) or the numbers of the sender's blocks that hold it (shared memory)
    END = 3  # all is sent; the payload is a TransferEnd
    APART = 4  # KV whose payload moves by the link's channel, at the header's turn; only the header is here


@dataclass(frozen=True, slots=True, kw_only=True)
class KvPart:
    """A box of one request's KV: layers [layer_start, layer_end), and so on; heads in the model's numbering."""

    layer_start: int
    layer_end: int
    head_start: int
    head_end: int
    token_start: int
    token_end: int

    @property
    def num_tokens(self) -> int:
        return self.token_end - self.token_start

    @property
    def num_heads(self) -> int:
        return self.head_end - self.head_start


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameHeader:
    """72 bytes in front of every payload."""

    kind: FrameKind
    grant_id: str
    attempt: int
    epoch: int
    part: KvPart
    wire: WireFormat  # of the payload
    sequence: int
    payload_bytes: int
    checksum: int  # xxh3_64 of the payload; 0 where it comes with END
    turn: int = 0  # APART: its place in the order of the link's channel
    round: int = 0  # which of the transfer's streams it belongs to

    def pack(self) -> bytes:
        part = self.part
        return _HEADER.pack(
            MAGIC,
            VERSION,
            self.kind,
            _CODECS.index(self.wire.codec),
            bytes.fromhex(self.grant_id),
            self.attempt,
            self.epoch,
            part.layer_start,
            part.layer_end,
            part.head_start,
            part.head_end,
            part.token_start,
            part.token_end,
            self.sequence,
            self.payload_bytes,
            self.checksum,
            self.turn,
            _DTYPES.index(self.wire.dtype),
            self.round,
        )

    @classmethod
    def unpack(cls, frame: bytes) -> FrameHeader:
        """Raises: KvCorrupted: no whole frame that this build understands. A link's ends agreed on their version when
        they met, so what cannot be read was damaged on its way, and another attempt can help."""
        if len(frame) < HEADER_BYTES:
            raise KvCorrupted(f"a frame of {len(frame)} bytes is shorter than its header of {HEADER_BYTES}")
        magic, version, kind, codec, grant_id, attempt, epoch, *rest = _HEADER.unpack_from(frame)
        layer_start, layer_end, head_start, head_end, token_start, token_end, sequence, payload_bytes, *rest = rest
        checksum, turn, dtype, round_number = rest
        known = kind in FrameKind._value2member_map_ and codec < len(_CODECS) and dtype < len(_DTYPES)
        if magic != MAGIC or version != VERSION or not known:
            raise KvCorrupted(
                f"frame with magic {magic!r}, version {version}, kind {kind}, codec {codec} and dtype {dtype}; this "
                f"build reads {MAGIC!r}, version {VERSION}, kinds 1 to 4, codecs and dtypes 0 to 2: upgrade the older "
                "worker"
            )
        if len(frame) != HEADER_BYTES + (0 if kind == FrameKind.APART else payload_bytes):
            raise KvCorrupted(f"frame {sequence} has {len(frame) - HEADER_BYTES} payload bytes, not {payload_bytes}")
        return cls(
            kind=FrameKind(kind),
            grant_id=grant_id.hex(),
            attempt=attempt,
            epoch=epoch,
            part=KvPart(
                layer_start=layer_start,
                layer_end=layer_end,
                head_start=head_start,
                head_end=head_end,
                token_start=token_start,
                token_end=token_end,
            ),
            wire=WireFormat(codec=_CODECS[codec], dtype=_DTYPES[dtype]),
            sequence=sequence,
            payload_bytes=payload_bytes,
            checksum=checksum,
            turn=turn,
            round=round_number,
        )


def new_frame(size_bytes: int) -> tuple[bytes, NDArray[np.uint8]]:
    """An uninitialised `bytes` and the view to fill it through, before anybody else sees it.

    gRPC takes nothing but `bytes`; filling one in place (as the C API allows for a new one) spares a copy of every
    frame, a tenth of the sender's time. The view must not outlive the filling.
    """
    frame = _bytes_new(None, size_bytes)
    view = (ctypes.c_uint8 * size_bytes).from_address(_bytes_address(frame))
    return frame, np.ctypeslib.as_array(view)


def checksum(data: bytes | bytearray | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(data)


class RunningDigest:
    """xxh3_128 over the geometry, all token ids of the request and the header of every KV frame, in order.

    The headers hold grant, ranges and checksums: equal digests mean that the same KV of the same tokens arrived.
    """

    def __init__(self, grant: Grant, token_ids: Sequence[int]) -> None:
        self._hash = xxhash.xxh3_128(grant.geometry_digest.encode())
        self._hash.update(array("I", token_ids).tobytes())

    def add(self, header: bytes | memoryview) -> None:
        self._hash.update(header)

    def add_checksums(self, values: Sequence[int]) -> None:
        """Those that came after the headers."""
        self._hash.update(array("Q", values).tobytes())

    def copy(self) -> RunningDigest:
        """One that goes on from here by itself."""
        other = RunningDigest.__new__(RunningDigest)
        other._hash = self._hash.copy()
        return other

    def digest(self) -> bytes:
        return self._hash.digest()
