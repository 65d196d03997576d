"""A prompt as an index of prefix caches names it."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.kv_geometry import PREFIX_UNIT
from .prefix import extend_hashes
from .prefix_feed import block_key
from .prefix_index import PrefixIndex

_FIRST_UNITS = 32  # hashed of every prompt: they also are what makes it one of a conversation, for policies that ask


class PromptKeys:
    """Keys of a prompt's full blocks, hashed no further than somebody may hold them: most of a long prompt is new.

    Args: block_size: tokens. Where it is no multiple of PREFIX_UNIT, no block ends where a hash does, and none matches.
    """

    def __init__(self, token_ids: Sequence[int], namespace: bytes, block_size: int) -> None:
        self._token_ids = token_ids
        self._namespace = namespace
        self._hashes: list[bytes] = []
        self._keys: list[int] = []
        units, rest = divmod(block_size, PREFIX_UNIT)
        self._units = 0 if rest else units  # of a block

    def match(self, index: PrefixIndex) -> dict[str, int]:
        """How many leading blocks each worker holds; those that hold none are left out."""
        while (not self._keys or index.holds(self._keys[-1])) and self._deepen():
            pass
        return index.match(self._keys)

    @property
    def session(self) -> bytes:
        """What prompts that begin alike share; b"" before the first `match`, and of less than one unit."""
        return self._hashes[min(_FIRST_UNITS, len(self._hashes)) - 1] if self._hashes else b""

    def _deepen(self) -> bool:
        """Hash as much again as is hashed; False if there is no more that could match."""
        before = len(self._hashes)
        if before and not self._units:
            return False
        end = max(_FIRST_UNITS, 2 * before) * PREFIX_UNIT
        extend_hashes(self._hashes, self._token_ids[:end], self._namespace)
        if self._units:
            ends = self._hashes[(len(self._keys) + 1) * self._units - 1 :: self._units]
            self._keys += map(block_key, ends)
        return len(self._hashes) > before
