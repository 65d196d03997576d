"""Byte views of a KV pool in a GPU's memory: parts are packed and checksums computed there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import TransferFailed
from .device_checksum import device_checksum
from .device_gather import move
from .frames import KvPart
from .frames import checksum as checksum_of
from .host_copies import HostCopies, Ids
from .layout import PoolBytes, check
from .pool import KvPool

HIGH_PRIORITY = -1  # a kernel of microseconds goes before the next wave of a step's large ones
_MAX_TABLES = 256  # block tables that are kept on the GPU
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


class DevicePoolBytes(PoolBytes):
    """Works on a stream of its own, so that it never waits for a step, and blocks until the result is there.

    Its callers are threads of transfers: each call makes the pool's device theirs.
    """

    def __init__(self, pool: KvPool, first_heads: Sequence[int] | None = None) -> None:
        self.device = pool.keys(0).device
        super().__init__(pool, first_heads)
        self._stream = torch.cuda.Stream(self.device, HIGH_PRIORITY)  # type: ignore[no-untyped-call]
        views = [plane for pair in self._planes for plane in pair]
        start = views[0].storage_offset()
        sizes = [self.row_bytes, *(view.shape[3] for view in views), *(view.storage_offset() - start for view in views)]
        self._word = next(word for word in _WORDS if all(size % word.itemsize == 0 for size in sizes))
        size, planes, before = self._word.itemsize, [], 0
        for number, view in enumerate(views):
            dim = view.shape[3] // size
            planes.append([(view.storage_offset() - start) // size, dim, before, self._first_heads[number // 2]])
            before += dim
        self._shape_of_planes = planes
        self._planes_there = torch.tensor(planes, dtype=torch.int32, device=self.device)
        self._load_kernels()

    def _array(self, view: Tensor) -> Any:
        return view

    def _own_copies(self) -> HostCopies | None:
        return None

    def _load_kernels(self) -> None:
        """So that no transfer waits until they are compiled: one token of each layer, in a row that is no block."""
        with self.on_own_stream() as stream:
            words = -(-self.row_bytes // 8)
            row = torch.zeros((1, words * 8), dtype=torch.uint8, device=self.device)
            for num_words in (words, 17):  # one kernel for multiples of 16, another for the rest
                data = torch.zeros((1, num_words * 8), dtype=torch.uint8, device=self.device)
                device_checksum(data, self.on_device(np.zeros(1, dtype=np.intp)), 0, num_words * 8)
            for layer, (keys, _) in enumerate(self._planes):
                heads = range(self._first_heads[layer], self._first_heads[layer] + keys.shape[1])
                part = KvPart(
                    layer_start=layer,
                    layer_end=layer + 1,
                    head_start=heads.start,
                    head_end=heads.stop,
                    token_start=0,
                    token_end=1,
                )
                flat = torch.empty(self.part_bytes(part), dtype=torch.uint8, device=self.device)
                for gather in (True, False):
                    self._move(part, (0,), flat, gather=gather, rows=row)
            stream.synchronize()

    @contextmanager
    def on_own_stream(self) -> Iterator[torch.cuda.Stream]:
        """Raises: TransferFailed: the GPU has no memory for it, or failed."""
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                yield self._stream
        except RuntimeError as error:
            raise TransferFailed(f"{self.device} could not move KV: {error}") from error

    def checksum(self, part: KvPart, block_ids: Ids) -> int:
        with self.on_own_stream():
            return self.checksum_here(part, self.on_device(block_ids))

    def on_device(self, block_ids: Ids) -> Tensor:
        """[n] int32. Copied once: the parts of a prompt's layers lie in the same blocks."""
        return _copied(block_ids.astype(np.int32).tobytes(), self.device)

    def checksum_here(self, part: KvPart, block_ids: Tensor) -> int:
        """The checksum, behind whatever the current stream has to do."""
        span = self.row_range(part)
        return device_checksum(self.rows, block_ids, span.start, span.stop - span.start)

    def gather(self, part: KvPart, block_table: Sequence[int], out: Tensor) -> None:
        self._move(part, block_table, out, gather=True)

    def scatter(self, part: KvPart, block_table: Sequence[int], data: Tensor) -> None:
        self._move(part, block_table, data, gather=False)

    def pack(self, part: KvPart, block_table: Sequence[int], out: Any) -> int:
        with self.on_own_stream():
            flat = torch.empty(self.part_bytes(part), dtype=torch.uint8, device=self.device)
            self.gather(part, block_table, flat)
            out[...] = flat.cpu().numpy()
        return checksum_of(out.data)

    def unpack(self, part: KvPart, block_table: Sequence[int], payload: Any, expected: int | None = None) -> None:
        if expected is not None:
            check(checksum_of(payload.data), expected, part)
        with self.on_own_stream() as stream:
            self.scatter(part, block_table, torch.tensor(payload).to(self.device))
            stream.synchronize()

    def _move(
        self,
        part: KvPart,
        block_table: Sequence[int],
        flat: Tensor,
        *,
        gather: bool,
        rows: Tensor | None = None,
    ) -> None:
        size, planes = self.block_size, slice(2 * part.layer_start, 2 * part.layer_end)
        first_block = part.token_start // size
        block_ids = np.asarray(block_table[first_block : -(-part.token_end // size)], dtype=np.int32)
        move(
            (self.rows if rows is None else rows).view(self._word),
            self._planes_there[planes],
            self.on_device(block_ids),
            flat.view(self._word),
            block_size=size,
            first_token=part.token_start - first_block * size,
            num_tokens=part.num_tokens,
            first_head=part.head_start,
            num_heads=part.num_heads,
            first_word=self._shape_of_planes[planes.start][2],
            width=max(dim for _, dim, _, _ in self._shape_of_planes[planes]),
            gather=gather,
        )


@lru_cache(maxsize=_MAX_TABLES)
def _copied(block_ids: bytes, device: torch.device) -> Tensor:
    """It is there when this returns, so any stream may use it."""
    return torch.from_numpy(np.frombuffer(block_ids, dtype=np.int32).copy()).to(device)
