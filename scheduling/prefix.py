"""Prefix hashes: which KV two prompts can share. One chained hash per 16 tokens, whatever the block size."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import MutableSequence, Sequence
from typing import Protocol

from ..core.kv_geometry import PREFIX_UNIT
from ..core.request import Request

_DIGEST_BYTES = 16
_UNIT_BYTES = PREFIX_UNIT * array("I").itemsize


def prefix_namespace(*, model_id: str, kv_dtype: str, tenant: str = "", codec: str = "none") -> bytes:
    """Root of a hash chain: KV of other weights, dtypes, codecs or tenants never matches.

    A cryptographic hash, since tenants choose their own prompts: a collision would serve someone else's answer.
    """
    parts = (model_id, kv_dtype, codec, tenant)
    encoded = b"".join(len(part.encode()).to_bytes(4, "little") + part.encode() for part in parts)
    return hashlib.blake2b(encoded, digest_size=_DIGEST_BYTES).digest()


def extend_hashes(hashes: list[bytes], token_ids: Sequence[int], namespace: bytes) -> None:
    """Append the hash of every further full unit of `token_ids`; hash i covers tokens [0, (i + 1) * PREFIX_UNIT)."""
    previous = hashes[-1] if hashes else namespace
    num_tokens = len(token_ids) // PREFIX_UNIT * PREFIX_UNIT
    units = array("I", token_ids[len(hashes) * PREFIX_UNIT : num_tokens]).tobytes()
    for start in range(0, len(units), _UNIT_BYTES):  # with what goes before, one block of the hash
        unit = units[start : start + _UNIT_BYTES]
        previous = hashlib.blake2b(previous + unit).digest()[:_DIGEST_BYTES]  # cut: asking for so few takes longer
        hashes.append(previous)


def prefix_hashes(token_ids: Sequence[int], namespace: bytes) -> list[bytes]:
    """Hashes of every full unit of `token_ids`."""
    hashes: list[bytes] = []
    extend_hashes(hashes, token_ids, namespace)
    return hashes


class Contents(Protocol):
    """What a scheduler reads of a request: the list of its tokens, and what stands for the prefixes of that list.

    Engines have real tokens. A simulator knows only how many there are and which prompts begin alike.
    """

    def token_ids(self, request: Request) -> MutableSequence[int]:
        """Prompt and output so far; grows as the request is answered."""
        ...

    def extend_hashes(
        self, hashes: list[bytes], token_ids: Sequence[int], request: Request, kv_history: str = "none"
    ) -> None:
        """Append the hash of every further full unit of the request's `token_ids`, whose KV has that history."""
        ...


class TokenContents:
    """Real tokens, hashed."""

    def __init__(self, *, model_id: str, kv_dtype: str) -> None:
        self._model_id = model_id
        self._kv_dtype = kv_dtype

    def token_ids(self, request: Request) -> MutableSequence[int]:
        return [*request.prompt_token_ids, *request.output_token_ids]

    def extend_hashes(
        self, hashes: list[bytes], token_ids: Sequence[int], request: Request, kv_history: str = "none"
    ) -> None:
        namespace = prefix_namespace(
            model_id=self._model_id, kv_dtype=self._kv_dtype, tenant=request.tenant, codec=kv_history
        )
        extend_hashes(hashes, token_ids, namespace)
