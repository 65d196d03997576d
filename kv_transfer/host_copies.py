"""Copies between blocks, payloads and a peer's blocks in a host's memory, by our own C code, with their checksums.

The C file says how: one pass at memory speed, no interpreter lock, past the caches where nobody reads next. What it
does not serve (heads of odd sizes), and machines that cannot compile it, are numpy's and xxhash's, with equal results.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.compiled import compiled

SOURCE = Path(__file__).with_suffix(".c")
_STRIPE = 64
_LEAST = 256  # bytes: XXH3 sums shorter inputs up in another way

Bytes = NDArray[np.uint8]
Ids = NDArray[np.integer[Any]]


class _Part(ctypes.Structure):
    """`Part` of the C file."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "flat", "blocks", "planes")),
        *((name, ctypes.c_int64) for name in ("row_bytes", "num_planes", "num_heads", "block_size")),
        *((name, ctypes.c_int64) for name in ("first_token", "num_tokens", "num_bytes")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PartPlace:
    """Where a part of KV lies in a pool.

    Args:
        planes: K and V of each layer: (bytes from a row's start to the part's first head, bytes of one of its tokens).
        blocks: that hold its tokens, in order.
        first_token: inside the first of them.
    """

    planes: Sequence[tuple[int, int]]
    blocks: Sequence[int]
    num_heads: int
    block_size: int
    first_token: int
    num_tokens: int


class HostCopies:
    """The compiled code. Every call lets other threads run; `rows` are a pool's: [num_blocks, row_bytes]."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._copy_rows = library.splitserve_copy_rows
        self._copy_rows.restype = ctypes.c_uint64
        self._copy_rows.argtypes = (ctypes.c_void_p,) * 4 + (ctypes.c_int64,) * 4
        self._gather, self._scatter = library.splitserve_gather, library.splitserve_scatter
        for move in (self._gather, self._scatter):
            move.restype, move.argtypes = ctypes.c_uint64, (ctypes.POINTER(_Part),)

    def serves_rows(self, rows: Bytes, num_rows: int, span: slice) -> bool:
        """Whether it can copy and sum up these bytes of some rows."""
        width = span.stop - span.start
        is_whole = _is_whole(_address(rows), rows.shape[1], span.start, width)
        return is_whole and rows.flags.c_contiguous and num_rows * width >= _LEAST

    def copy_rows(self, target: Bytes, target_ids: Ids, source: Bytes, source_ids: Ids, span: slice) -> int:
        """Copy rows by their numbers. Returns xxh3_64 of what now is in the target's, in order."""
        if source.shape[1] != target.shape[1] or len(source_ids) != len(target_ids):
            raise ValueError(f"{len(source_ids)} rows of {source.shape[1]} bytes to {len(target_ids)} rows of others")
        return self._rows(_address(target), _inside(target, target_ids), source, source_ids, span)

    def checksum_rows(self, rows: Bytes, ids: Ids, span: slice) -> int:
        """xxh3_64 of rows, in order."""
        return self._rows(None, None, rows, ids, span)

    def _rows(
        self, target: int | None, target_ids: NDArray[np.int64] | None, source: Bytes, source_ids: Ids, span: slice
    ) -> int:
        ids = _inside(source, source_ids)
        return int(
            self._copy_rows(
                target,
                _address(source),
                None if target_ids is None else _address(target_ids),
                _address(ids),
                len(ids),
                source.shape[1],
                span.start,
                span.stop - span.start,
            )
        )

    def serves_part(self, rows: Bytes, place: PartPlace, num_bytes: int) -> bool:
        """Whether it can gather and scatter a part of so many bytes."""
        sizes = (size for plane in place.planes for size in plane)
        is_whole = _is_whole(_address(rows), rows.shape[1], *sizes)
        return is_whole and rows.flags.c_contiguous and num_bytes >= _LEAST

    def gather(self, rows: Bytes, place: PartPlace, flat: Bytes) -> int:
        """Fill `flat` with a part in canonical order. Returns its xxh3_64."""
        return self._move(self._gather, rows, place, flat)

    def scatter(self, rows: Bytes, place: PartPlace, flat: Bytes) -> int:
        """The other way round; `flat` may be read-only. Returns xxh3_64 of what was written."""
        return self._move(self._scatter, rows, place, flat)

    def _move(self, move: Any, rows: Bytes, place: PartPlace, flat: Bytes) -> int:
        blocks = _inside(rows, np.asarray(place.blocks))
        planes = np.array(place.planes, dtype=np.int64)
        starts, token_bytes = planes[:, 0], planes[:, 1]
        ends = starts + place.num_heads * place.block_size * token_bytes
        if int(starts.min()) < 0 or int(ends.max()) > rows.shape[1]:
            raise IndexError(f"{place.num_heads} heads from {starts.tolist()} on, in rows of {rows.shape[1]} bytes")
        if place.first_token + place.num_tokens > len(blocks) * place.block_size:
            raise IndexError(f"{place.num_tokens} tokens in {len(blocks)} blocks of {place.block_size}")
        num_bytes = place.num_heads * place.num_tokens * int(token_bytes.sum())
        if flat.nbytes != num_bytes or not flat.flags.c_contiguous:
            raise ValueError(f"{flat.nbytes} bytes for a part that has {num_bytes}")
        part = _Part(
            rows=_address(rows),
            flat=_address(flat),
            blocks=_address(blocks),
            planes=_address(planes),
            row_bytes=rows.shape[1],
            num_planes=len(planes),
            num_heads=place.num_heads,
            block_size=place.block_size,
            first_token=place.first_token,
            num_tokens=place.num_tokens,
            num_bytes=num_bytes,
        )
        return int(move(ctypes.byref(part)))


@cache
def host_copies() -> HostCopies | None:
    """The code of this process, compiled if no process of this user did it before; None: it cannot be."""
    library = compiled(SOURCE)
    return None if library is None else HostCopies(library)


def _address(array: NDArray[Any]) -> int:
    return array.ctypes.data


def _is_whole(*numbers: int) -> bool:
    return all(number % _STRIPE == 0 for number in numbers)


def _inside(rows: Bytes, ids: Ids) -> NDArray[np.int64]:
    """Raises: IndexError: there is no such row."""
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(rows):
        raise IndexError(f"rows {ids.min()} to {ids.max()} of {len(rows)}")
    return np.ascontiguousarray(ids, dtype=np.int64)
