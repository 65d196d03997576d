"""The KV pool as transfers see it; the engine's pool satisfies this by shape, so neither imports the other."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..core.kv_geometry import KvGeometry


class KvPool(Protocol):
    """Paged KV in host memory: one contiguous row per block, inside it [layer][K|V][head][token][dim]."""

    @property
    def geometry(self) -> KvGeometry: ...
    @property
    def block_size(self) -> int: ...  # tokens in a block
    @property
    def num_blocks(self) -> int: ...
    @property
    def fd(self) -> int | None: ...  # sealed memfd that holds the pool; None for private memory
    @property
    def size_bytes(self) -> int: ...
    @property
    def row_bytes(self) -> int: ...  # one block over all layers

    def keys(self, layer: int) -> Tensor:
        """View [num_blocks, num_kv_heads, block_size, key_dim] of the pool."""

    def values(self, layer: int) -> Tensor:
        """View [num_blocks, num_kv_heads, block_size, value_dim] of the pool."""
