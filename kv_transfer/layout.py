"""Between paged rows and the wire's canonical order: [layer][K|V][head][token][dim] over a token range.

The canonical order knows no blocks, so sender and receiver may have different block sizes. Everything here works on
byte views: any dtype. In host memory host_copies.py does the work, and numpy what that does not serve.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import KvCorrupted
from .frames import KvPart
from .frames import checksum as checksum_of
from .host_copies import Bytes, HostCopies, Ids, PartPlace, host_copies
from .pool import KvPool

_Index = slice | NDArray[np.intp]


class PoolBytes:
    """Byte views of a pool, made once. These are of host memory; device_layout.py has those of a GPU's.

    Args: first_heads: per layer, the number that the model gives to the first head of the pool; 0 without tensor
        parallelism.
    """

    def __init__(self, pool: KvPool, first_heads: Sequence[int] | None = None) -> None:
        self.block_size = pool.block_size
        self.num_blocks = pool.num_blocks
        self.row_bytes = pool.row_bytes
        layers = range(pool.geometry.num_layers)
        self._first_heads = tuple(first_heads or (0 for _ in layers))
        views = [(pool.keys(layer), pool.values(layer)) for layer in layers]
        self._planes = [tuple(self._array(view.view(torch.uint8)) for view in pair) for pair in views]
        head_bytes = (sum(plane.shape[3] for plane in pair) for pair in self._planes)
        self._head_bytes: list[int] = [0, *accumulate(head_bytes)]  # of a token and a head, of all layers before each
        first, itemsize = views[0][0], views[0][0].element_size()
        self._offsets = [(key.storage_offset() - first.storage_offset()) * itemsize for key, _ in views]
        self._offsets.append(pool.row_bytes)
        # Of each layer's K and V: bytes from a row's start, of a head, and of a head's token.
        start = first.storage_offset()
        self._shapes = [
            [
                (
                    (int(view.storage_offset()) - int(start)) * itemsize,
                    view.stride(1) * itemsize,
                    view.stride(2) * itemsize,
                )
                for view in pair
            ]
            for pair in views
        ]
        flat = first.as_strided((pool.num_blocks, pool.row_bytes // itemsize), (first.stride(0), 1))
        self.rows = self._array(flat.view(torch.uint8))  # [num_blocks, row_bytes]
        self._copies = self._own_copies()

    def _array(self, view: Tensor) -> Any:
        """What a view is indexed as."""
        return view.numpy()

    def _own_copies(self) -> HostCopies | None:
        """What serves this memory, but for odd sizes."""
        return host_copies()

    def row_range(self, part: KvPart) -> slice:
        """The bytes of a row that hold the part's layers."""
        return slice(self._offsets[part.layer_start], self._offsets[part.layer_end])

    def part_bytes(self, part: KvPart) -> int:
        """Canonical bytes of a part, whatever the block size."""
        per_head = self._head_bytes[part.layer_end] - self._head_bytes[part.layer_start]
        return part.num_tokens * part.num_heads * per_head

    def checksum(self, part: KvPart, block_ids: Ids) -> int:
        """64 bits over the part's layers of these blocks, in order: what a copy of them must have as well."""
        span = self.row_range(part)
        if self._copies is not None and self._copies.serves_rows(self.rows, len(block_ids), span):
            return self._copies.checksum_rows(self.rows, block_ids, span)
        digest = xxhash.xxh3_64()
        for block in block_ids:
            digest.update(self.rows[block, span].data)
        return digest.intdigest()

    def copy_rows(self, part: KvPart, source: Bytes, source_ids: Ids, block_ids: Ids) -> int:
        """Copy the part's layers of whole blocks from another pool's rows. Returns the checksum of what now is here."""
        span = self.row_range(part)
        if self._copies is not None and all(
            self._copies.serves_rows(rows, len(block_ids), span) for rows in (source, self.rows)
        ):
            return self._copies.copy_rows(self.rows, block_ids, source, source_ids, span)
        digest = xxhash.xxh3_64()
        for from_row, to_row in zip(source_ids, block_ids, strict=True):
            copied = self.rows[to_row, span]
            copied[...] = source[from_row, span]
            digest.update(copied.data)
        return digest.intdigest()

    def pack(self, part: KvPart, block_table: Sequence[int], out: Any) -> int:
        """Gather a part from its blocks into `out` [part_bytes] uint8. Returns its checksum."""
        if (place := self._place(part, block_table)) is not None:
            assert self._copies is not None
            return self._copies.gather(self.rows, place, out)
        for plane, blocks, heads, inside, canonical in self._pieces(part, block_table, out):
            canonical[...] = plane[blocks, heads, inside].swapaxes(0, 1)
        return checksum_of(out.data)

    def unpack(self, part: KvPart, block_table: Sequence[int], payload: Any, expected: int | None = None) -> None:
        """Scatter a canonical payload [part_bytes] uint8 into its blocks.

        Args: expected: its checksum; None: it was checked.
        Raises: KvCorrupted: it has another one. The part's place in the blocks holds what it held, or zeros.
        """
        if (place := self._place(part, block_table)) is not None:
            assert self._copies is not None
            found = self._copies.scatter(self.rows, place, payload)
            if expected is not None and found != expected:  # not a NaN where attention reads padding
                self._copies.scatter(self.rows, place, np.zeros_like(payload))
                check(found, expected, part)
            return
        if expected is not None:
            check(checksum_of(payload.data), expected, part)
        for plane, blocks, heads, inside, canonical in self._pieces(part, block_table, payload):
            plane[blocks, heads, inside] = canonical.swapaxes(0, 1)

    def _place(self, part: KvPart, block_table: Sequence[int]) -> PartPlace | None:
        """Where a part lies; None: it is not for `_copies`."""
        if self._copies is None:
            return None
        first_block, inside = divmod(part.token_start, self.block_size)
        place = PartPlace(
            planes=[
                (offset + (part.head_start - self._first_heads[layer]) * head_bytes, token_bytes)
                for layer in range(part.layer_start, part.layer_end)
                for offset, head_bytes, token_bytes in self._shapes[layer]
            ],
            blocks=block_table[first_block : -(-part.token_end // self.block_size)],
            num_heads=part.num_heads,
            block_size=self.block_size,
            first_token=inside,
            num_tokens=part.num_tokens,
        )
        return place if self._copies.serves_part(self.rows, place, self.part_bytes(part)) else None

    def gather(self, part: KvPart, block_table: Sequence[int], out: Tensor) -> None:
        """`pack` into a tensor beside the pool; on a GPU it is only queued."""
        self.pack(part, block_table, out.numpy())

    def scatter(self, part: KvPart, block_table: Sequence[int], data: Tensor) -> None:
        """`unpack` from a tensor beside the pool; on a GPU it is only queued."""
        self.unpack(part, block_table, data.numpy())

    def _pieces(
        self, part: KvPart, block_table: Sequence[int], flat: Any
    ) -> Iterator[tuple[Any, _Index, slice, slice, Any]]:
        """What goes together: (plane [num_blocks, heads, block_size, dim bytes], blocks, heads of the pool, tokens
        inside each block, their place in `flat` [heads, blocks, tokens, dim bytes])."""
        runs, position, num_heads = list(self._runs(part, block_table)), 0, part.num_heads
        for layer in range(part.layer_start, part.layer_end):
            first = part.head_start - self._first_heads[layer]
            heads = slice(first, first + num_heads)
            for plane in self._planes[layer]:
                dim = plane.shape[3]
                size = num_heads * part.num_tokens * dim
                canonical = flat[position : position + size].reshape(num_heads, part.num_tokens, dim)
                position += size
                for blocks, inside, tokens in runs:  # splitting one axis of a strided view never copies
                    width = inside.stop - inside.start
                    yield plane, blocks, heads, inside, canonical[:, tokens].reshape(num_heads, -1, width, dim)

    def _runs(self, part: KvPart, block_table: Sequence[int]) -> Iterator[tuple[_Index, slice, slice]]:
        """Cut a token range into a partial first block, whole blocks and a partial last block.

        Yields (blocks, tokens inside each block, tokens of the part).
        """
        size, token = self.block_size, part.token_start
        while token < part.token_end:
            inside = token % size
            whole = (part.token_end - token) // size if inside == 0 else 0
            end = token + whole * size if whole else min(part.token_end, token - inside + size)
            blocks = _consecutive(block_table[token // size : -(-end // size)])
            stop = size if whole else inside + end - token
            yield blocks, slice(inside, stop), slice(token - part.token_start, end - part.token_start)
            token = end


def check(found: int, expected: int, part: KvPart) -> None:
    """Raises: KvCorrupted."""
    if found != expected:
        raise KvCorrupted(f"the checksum of {part} is {found:#x}, not {expected:#x}: it was damaged on its way")


def _consecutive(ids: Sequence[int]) -> _Index:
    """Index of some blocks: a slice where it can be one, since numpy gathers by array through a copy."""
    if all(after - before == 1 for before, after in pairwise(ids)):
        return slice(ids[0], ids[-1] + 1)
    return np.asarray(ids, dtype=np.intp)


def pool_bytes(pool: KvPool, first_heads: Sequence[int] | None = None) -> PoolBytes:
    """The byte views that fit the pool's memory."""
    if pool.keys(0).device.type == "cpu":
        return PoolBytes(pool, first_heads)
    from .device_layout import DevicePoolBytes

    return DevicePoolBytes(pool, first_heads)
