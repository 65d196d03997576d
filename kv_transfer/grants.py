"""A decode worker's promise of blocks for one attempt of one request; it fences every later message."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.kv_geometry import KvDtype
from ..proto import kv_transfer_pb2
from .codecs import CodecName, WireFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSource:
    """The prefill worker, or the one rank of it, that a request's KV comes from."""

    address: str
    boot_id: str
    dtype: KvDtype | None = None  # of its pool; None if it is the receiver's
    num_ranks: int = 1
    rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Field by field as proto/kv_transfer.proto documents it; two are the same only if every field is."""

    grant_id: str  # 16 random bytes in hex
    request_id: str
    attempt: int
    epoch: int
    decode_boot_id: str
    prefill_boot_id: str
    geometry_digest: str
    num_cached_tokens: int
    num_tokens: int
    lease_s: float
    codec: CodecName
    wire_dtype: KvDtype  # of unquantised KV: the narrower one of the two pools
    prefill_ranks: int = 1  # tensor-parallel ranks of the prefill worker, and the one that this grant is for
    prefill_rank: int = 0
    decode_ranks: int = 1
    decode_rank: int = 0
    proof_sha256: bytes = b""  # capability.py
    source_key: bytes = field(default=b"", compare=False, repr=False)  # for the prefill worker alone

    @property
    def wire(self) -> WireFormat:
        return WireFormat(codec=self.codec, dtype=self.wire_dtype)

    def to_proto(self) -> kv_transfer_pb2.Grant:
        return kv_transfer_pb2.Grant(**{name: getattr(self, name) for name in self.__slots__})

    def to_peer(self) -> kv_transfer_pb2.Grant:
        """As a decode worker shows it: whoever answers at the address may not be who was given the key."""
        message = self.to_proto()
        message.ClearField("source_key")
        return message

    @classmethod
    def from_proto(cls, message: kv_transfer_pb2.Grant) -> Grant:
        return cls(**{name: getattr(message, name) for name in cls.__slots__})

    def __str__(self) -> str:
        return f"grant {self.grant_id[:8]} of request {self.request_id}, attempt {self.attempt}, epoch {self.epoch}"
