"""What lets one decode worker fetch the KV of one grant, and one prefill worker send it: nobody else can do either.

Both proofs are made of the grant, field by field, under a secret that never leaves the decode worker's process. The
grant holds the hash of the first: only who made it can show the proof itself, and the router that carries it, its
logs and whoever reads them cannot. The key of the second travels with the grant to the prefill worker alone; the last
frame is signed with it. Both end with the grant: its lease on the prefill worker, its fetch on the decode worker.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import replace
from functools import lru_cache

from ..core.errors import CapabilityRefused, KvCorrupted
from ..proto import kv_transfer_pb2 as pb
from .grants import Grant


class Granter:
    """The secret of one boot of a decode worker. Args: secret: 32 bytes, the same for all its ranks."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @classmethod
    def new(cls) -> Granter:
        return cls(secrets.token_bytes(32))

    def seal(self, grant: Grant) -> Grant:
        """The grant as the router and the prefill worker get it."""
        fields = _fields(grant)
        proof = self._mac(b"fetch", fields)
        return replace(grant, proof_sha256=hashlib.sha256(proof).digest(), source_key=self._mac(b"source", fields))

    def proof(self, grant: Grant) -> bytes:
        """For the prefill worker that the grant names, with each Fetch and Commit."""
        return self._mac(b"fetch", _fields(grant))

    def check_end(self, grant: Grant, end: pb.TransferEnd) -> None:
        """Raises: KvCorrupted: who sent the KV was not given the grant."""
        key = self._mac(b"source", _fields(grant))
        if not hmac.compare_digest(end.signature, _signature(key, end)):
            raise KvCorrupted(f"{grant}: its KV does not come from the prefill worker that was given the grant")

    def _mac(self, purpose: bytes, fields: bytes) -> bytes:
        return hmac.digest(self._secret, purpose + b"\0" + fields, "sha256")


@lru_cache(maxsize=256)  # each grant's are asked for with its fetch, its end and its commit
def _fields(grant: Grant) -> bytes:
    """What was granted; not the proofs that are made of it."""
    message = grant.to_proto()
    message.ClearField("proof_sha256")
    message.ClearField("source_key")
    return message.SerializeToString(deterministic=True)


def check_proof(grant: Grant, proof: bytes) -> None:
    """Args: grant: as the router brought it. Raises: CapabilityRefused: the caller is not who made it."""
    if not hmac.compare_digest(hashlib.sha256(proof).digest(), grant.proof_sha256):
        raise CapabilityRefused(f"{grant}: the caller is not the decode worker that made it")


def sign_end(grant: Grant, end: pb.TransferEnd) -> None:
    """Sign the last frame as the prefill worker that was given the grant."""
    end.signature = _signature(grant.source_key, end)


def _signature(key: bytes, end: pb.TransferEnd) -> bytes:
    """Over what decides how the answer goes on; the digest covers KV, tokens and headers."""
    said = f"{end.first_token_id} {int(end.finished)} {end.num_frames} {end.num_bytes} ".encode()
    return hmac.digest(key, said + end.digest, "sha256")
