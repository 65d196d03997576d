"""Between paged rows and the wire's canonical order: [layer][K|V][head][token][dim] over a token range.

The canonical order knows no blocks, so sender and receiver may have different block sizes. Everything here works on
numpy byte views: one thread, no interpreter lock while it copies, and any dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .frames import KvPart
from .pool import KvPool

Bytes = NDArray[np.uint8]


class PoolBytes:
    """Byte views of a host pool, made once."""

    def __init__(self, pool: KvPool) -> None:
        self.block_size = pool.block_size
        self.num_blocks = pool.num_blocks
        self.row_bytes = pool.row_bytes
        layers = range(pool.geometry.num_layers)
        views = [(pool.keys(layer), pool.values(layer)) for layer in layers]
        self._planes = [tuple(view.view(torch.uint8).numpy() for view in pair) for pair in views]
        first, itemsize = views[0][0], views[0][0].element_size()
        self._offsets = [(key.storage_offset() - first.storage_offset()) * itemsize for key, _ in views]
        self._offsets.append(pool.row_bytes)
        flat = first.as_strided((pool.num_blocks, pool.row_bytes // itemsize), (first.stride(0), 1))
        self.rows: Bytes = flat.view(torch.uint8).numpy()  # [num_blocks, row_bytes]

    def row_range(self, part: KvPart) -> slice:
        """The bytes of a row that hold the part's layers."""
        return slice(self._offsets[part.layer_start], self._offsets[part.layer_end])

    def part_bytes(self, part: KvPart) -> int:
        """Canonical bytes of a part, whatever the block size."""
        planes = self._planes[part.layer_start : part.layer_end]
        per_token: int = sum(plane.shape[1] * plane.shape[3] for pair in planes for plane in pair)
        return part.num_tokens * per_token

    def pack(self, part: KvPart, block_table: Sequence[int], out: Bytes) -> None:
        """Gather a part from its blocks into `out` [part_bytes]."""
        for plane, canonical in self._canonical(part, out):
            for blocks, inside, tokens in self._runs(part, block_table):
                canonical[:, tokens].reshape(_paged(canonical, blocks, inside))[...] = plane[
                    blocks, :, inside
                ].swapaxes(0, 1)

    def unpack(self, part: KvPart, block_table: Sequence[int], payload: Bytes) -> None:
        """Scatter a canonical payload [part_bytes] into its blocks."""
        for plane, canonical in self._canonical(part, payload):
            for blocks, inside, tokens in self._runs(part, block_table):
                plane[blocks, :, inside] = (
                    canonical[:, tokens].reshape(_paged(canonical, blocks, inside)).swapaxes(0, 1)
                )

    def _canonical(self, part: KvPart, flat: Bytes) -> Iterator[tuple[Bytes, Bytes]]:
        """Each plane [num_blocks, heads, block_size, dim bytes] and its piece of `flat` [heads, tokens, dim bytes]."""
        position = 0
        for pair in self._planes[part.layer_start : part.layer_end]:
            for plane in pair:
                shape = (plane.shape[1], part.num_tokens, plane.shape[3])
                size = shape[0] * shape[1] * shape[2]
                yield plane, flat[position : position + size].reshape(shape)
                position += size

    def _runs(self, part: KvPart, block_table: Sequence[int]) -> Iterator[tuple[NDArray[np.intp], slice, slice]]:
        """Cut a token range into a partial first block, whole blocks and a partial last block.

        Yields (block ids, tokens inside each block, tokens of the part).
        """
        size, token = self.block_size, part.token_start
        while token < part.token_end:
            inside = token % size
            whole = (part.token_end - token) // size if inside == 0 else 0
            end = token + whole * size if whole else min(part.token_end, token - inside + size)
            blocks = np.asarray(block_table[token // size : -(-end // size)], dtype=np.intp)
            stop = size if whole else inside + end - token
            yield blocks, slice(inside, stop), slice(token - part.token_start, end - part.token_start)
            token = end


def _paged(canonical: Bytes, blocks: NDArray[np.intp], inside: slice) -> tuple[Any, ...]:
    """[heads, blocks, tokens in each, dim bytes]: splitting one axis of a strided view never copies."""
    return canonical.shape[0], len(blocks), inside.stop - inside.start, canonical.shape[2]
